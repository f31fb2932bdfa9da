# SPDX-License-Identifier: Apache-2.0
"""The routing probe of UniPool (arXiv:2605.06665): random experts in one layer at a time.

How much worse a model gets says how much the choice of that layer matters, given all the others.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from unipool.analysis.collect import Choice, RoutedLayer, Score, routed_layers, score, select_layers
from unipool.errors import InputError

WEIGHTS = ("rule", "kept")


@dataclass(frozen=True)
class LayerProbe:
    """One layer under random routing, one entry a seed; differences to the model as it is."""

    layer: int
    loss: list[float]  # nats per token
    accuracy: list[float]
    loss_increase: float  # mean over seeds
    loss_spread: float | None  # standard deviation over seeds (n - 1); None for one seed
    accuracy_drop: float  # mean over seeds, as a fraction
    accuracy_spread: float | None


@dataclass(frozen=True)
class Probe:
    """The probe of a model. weights: "rule" or "kept", see random_routing."""

    loss: float
    accuracy: float
    tokens: int
    weights: str
    seeds: list[int]
    layers: list[LayerProbe]

    def to_dict(self) -> dict:
        return asdict(self)


def random_routing(
    layer: RoutedLayer, weights: str, generator: torch.Generator
) -> Callable[[Choice], tuple[Tensor, Tensor]]:
    """A replacement for the choice of `layer`: k distinct experts, uniform among those allowed.

    weights: "rule": the drawn experts get the weights that the router's rule gives them (their
    scores, renormalised if the router does so); "kept": the weights of the learned choice stay,
    slot by slot. The draws come from `generator`, on the CPU, whatever the model's device.
    """

    def use(choice: Choice) -> tuple[Tensor, Tensor]:
        draws = torch.rand(choice.scores.shape, generator=generator)
        draws[:, ~choice.allowed.cpu()] = -1.0
        top = draws.topk(choice.experts.shape[1], dim=1)
        experts = top.indices.masked_fill(top.values < 0, -1).to(choice.experts.device)
        if weights == "kept":
            return choice.weights, experts
        return layer.weights_of(choice.scores, experts), experts

    return use


def run_probe(
    model: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    *,
    layers: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    weights: str = "rule",
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Evaluate `model` as it is, then with each layer in turn under random routing, for each seed.

    batches: gives the same ids [B, S] each time it is called. layers: numbers of decoder layers,
    None for every MoE layer. progress: called with (evaluations done, all).
    Raises InputError for an unknown layer, no seed, or a model whose routing cannot be replaced.
    """
    if weights not in WEIGHTS:
        raise InputError(f"--weights must be one of {', '.join(WEIGHTS)}, got {weights}")
    if not seeds:
        raise InputError("--seeds must be at least 1, got 0")
    chosen = select_layers(routed_layers(model), layers)
    total = 1 + len(chosen) * len(seeds)
    base = score(model, batches())
    probed: list[LayerProbe] = []
    for position, layer in enumerate(chosen):
        scores = []
        for seed in seeds:
            if progress is not None:
                progress(1 + position * len(seeds) + len(scores), total)
            # One stream a (layer, seed), so that a layer's result does not hang on the others.
            generator = torch.Generator().manual_seed(seed * 100_003 + layer.index)
            with layer.watched(random_routing(layer, weights, generator)):
                scores.append(score(model, batches()))
        probed.append(_layer_probe(layer.index, base, scores))
    return Probe(*base, weights, list(seeds), probed)


def _layer_probe(index: int, base: Score, scores: list[Score]) -> LayerProbe:
    losses, accuracies = [s.loss for s in scores], [s.accuracy for s in scores]
    several = len(scores) > 1
    return LayerProbe(
        layer=index,
        loss=losses,
        accuracy=accuracies,
        loss_increase=statistics.fmean(losses) - base.loss,
        loss_spread=statistics.stdev(losses) if several else None,
        accuracy_drop=base.accuracy - statistics.fmean(accuracies),
        accuracy_spread=statistics.stdev(accuracies) if several else None,
    )
