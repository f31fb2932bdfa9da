# SPDX-License-Identifier: Apache-2.0
"""The routed layers of a model, and hooks that see, and may replace, what their routers choose.

Two kinds of models are known: UniPool's own, whose routers return a Routing, and Hugging Face MoE
models whose router module returns (logits, weights, experts) beside a module of packed experts, as
Mixtral, Qwen-MoE and OLMoE do. Nothing in a model is changed but by hooks that are removed again.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unipool.analysis.metrics import entropy
from unipool.errors import InputError
from unipool.models import UniPoolPreTrainedModel
from unipool.nn import NormRouter, RecurrentRouter, SoftmaxRouter
from unipool.ops import Routing

_SUPPORTED = "a UniPool model or a Hugging Face MoE model such as Mixtral, Qwen-MoE or OLMoE"


class Choice(NamedTuple):
    """What one router did with T tokens; M experts, k a token."""

    scores: Tensor  # [T, M] float32 or float64, not negative: what the experts were chosen by
    weights: Tensor  # [T, k], in the dtype of the router's output
    experts: Tensor  # [T, k] int64; -1 for a slot without an expert
    allowed: Tensor  # [M] bool: experts that no mask hides


class Score(NamedTuple):
    """Next-token prediction over a text."""

    loss: float  # mean cross-entropy, nats per token
    accuracy: float  # fraction of tokens that got the greatest logit
    tokens: int


@dataclass(frozen=True)
class RoutedLayer:
    """One MoE layer of a model.

    index: number of the decoder layer. experts: the module that holds its experts' weights. pool:
    which set of experts that is; in layers of the same pool, the same id is the same expert.
    num_experts: M, how many the pool has. visible: ids in the pool of the experts that the router
    chooses among, in the order of its rows.
    """

    index: int
    router: nn.Module
    experts: nn.Module
    pool: int
    num_experts: int
    visible: tuple[int, ...]
    top_k: int

    @property
    def scale(self) -> float | None:
        """NormRouter's learned sigma; None for routers without one."""
        scale = getattr(self.router, "scale", None)
        return scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else None

    def weights_of(self, scores: Tensor, experts: Tensor) -> Tensor:
        """The weights [T, k] that this router's rule gives to `experts` [T, k] under `scores`."""
        weights = scores.gather(1, experts.clamp(min=0)) * (experts >= 0)
        if self._renormalizes:
            total = weights.sum(dim=1, keepdim=True)
            weights = weights / torch.where(total == 0, 1.0, total)
        return weights

    @contextlib.contextmanager
    def watched(self, use: Callable[[Choice], tuple[Tensor, Tensor] | None]) -> Iterator[None]:
        """While open, `use` gets each Choice; what it returns, (weights, experts), replaces it."""

        def hook(router, args, kwargs, output):
            choice = self._read(args, kwargs, output)
            replacement = use(choice)
            if replacement is not None:
                return self._replaced(output, *replacement, choice.allowed.numel())
            return None

        handle = self.router.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def _renormalizes(self) -> bool:
        if _is_ours(self.router):
            return bool(getattr(self.router, "renormalize", False))
        return bool(getattr(self.router, "norm_topk_prob", True))  # Mixtral always does

    def _read(self, args: tuple, kwargs: dict, output) -> Choice:
        if _is_ours(self.router):
            given = inspect.signature(self.router.forward).bind(*args, **kwargs).arguments
            routing = output if isinstance(output, Routing) else output[0]
            scores, allowed = _own_scores(self.router, given)
            choice = Choice(scores, routing.weights, routing.experts.long(), allowed)
        else:
            choice = self._read_gate(output)
        expected = self.weights_of(choice.scores, choice.experts)
        tolerance = 2e-2 if choice.weights.dtype.itemsize < 4 else 1e-3
        if not torch.allclose(
            choice.weights.to(expected.dtype), expected, rtol=tolerance, atol=tolerance / 10
        ):
            raise InputError(
                f"layer {self.index}: the weights of {type(self.router).__name__} are not those "
                f"of a softmax router; needs {_SUPPORTED}"
            )
        return choice

    def _read_gate(self, output) -> Choice:
        parts = output if isinstance(output, tuple) else ()
        if len(parts) != 3 or not all(isinstance(part, Tensor) for part in parts):
            raise InputError(
                f"layer {self.index}: {type(self.router).__name__} does not return logits, "
                f"weights and experts; needs {_SUPPORTED}"
            )
        logits, weights, experts = parts
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = torch.softmax(logits, dim=1, dtype=wide)
        allowed = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        return Choice(scores, weights, experts.long(), allowed)

    def _replaced(self, output, weights: Tensor, experts: Tensor, num_experts: int):
        if not _is_ours(self.router):
            return (output[0], weights.to(output[1].dtype), experts.to(output[2].dtype))
        old = output if isinstance(output, Routing) else output[0]
        load = torch.bincount(experts[experts >= 0], minlength=num_experts).to(old.load.dtype)
        new = Routing(
            weights.to(old.weights.dtype), experts.to(old.experts.dtype), load, old.importance
        )
        return new if isinstance(output, Routing) else (new, *output[1:])


def _is_ours(router: nn.Module) -> bool:
    return isinstance(router, NormRouter | SoftmaxRouter | RecurrentRouter)


def _own_scores(router: nn.Module, given: dict) -> tuple[Tensor, Tensor]:
    """All scores [T, M] of one of our routers, and which experts [M] no mask hides."""
    if isinstance(router, RecurrentRouter):
        logits, _ = router.logits(given["x"], given["cell"], given.get("state"))
    else:
        logits = router.logits(given["x"])
    mask = given.get("mask")
    if mask is None:
        mask = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    if getattr(router, "scale", None) is None:
        return torch.softmax(logits.masked_fill(mask, -torch.inf), dim=1), ~mask
    z = logits.masked_fill(mask, 0.0)
    unit = z / (torch.linalg.vector_norm(z, dim=1, keepdim=True) + router.eps)
    return router.scale.to(z.dtype) * router.calibration * torch.relu(unit), ~mask


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The MoE layers of a model, lowest first. InputError for a model without any."""
    if isinstance(model, UniPoolPreTrainedModel):
        found = _own_layers(getattr(model, "model", model))
    else:
        found = _hugging_face_layers(model)
    if not found:
        raise InputError(f"{type(model).__name__} has no MoE layer to look at; needs {_SUPPORTED}")
    return found


def _own_layers(backbone: nn.Module) -> list[RoutedLayer]:
    found = []
    for index, layer in enumerate(backbone.layers):
        number = backbone.config.pool_index(index)
        pool, visible = backbone.pools[number], tuple(backbone.config.visible_experts(index))
        found.append(
            RoutedLayer(
                index, layer.router, pool, number, pool.num_experts, visible, layer.router.top_k
            )
        )
    return found


def _hugging_face_layers(model: nn.Module) -> list[RoutedLayer]:
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        experts, router = children.get("experts"), children.get("gate", children.get("router"))
        packed = getattr(experts, "gate_up_proj", None)
        if not isinstance(packed, Tensor) or packed.dim() != 3 or not hasattr(router, "top_k"):
            continue
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
        index = int(numbers[-1]) if numbers else len(found)
        count = packed.shape[0]
        found.append(
            RoutedLayer(
                index, router, experts, len(found), count, tuple(range(count)), router.top_k
            )
        )
    return found


def select_layers(layers: list[RoutedLayer], wanted: Iterable[int] | None) -> list[RoutedLayer]:
    """The layers with the numbers `wanted` (None or none: all). InputError for an unknown one."""
    by_index = {layer.index: layer for layer in layers}
    for index in wanted or ():
        if index not in by_index:
            known = ", ".join(map(str, by_index))
            raise InputError(f"--layer must be one of the MoE layers {known}, got {index}")
    return [by_index[index] for index in dict.fromkeys(wanted)] if wanted else layers


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Tensor]) -> Score:
    """Loss and accuracy of the next token over `batches` of ids [B, S], in evaluation mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, hits, tokens = 0.0, 0, 0
    try:
        for ids in batches:
            ids = ids.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            targets = ids[:, 1:].flatten()
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
            hits += int((logits.argmax(dim=1) == targets).sum())
            tokens += targets.numel()
    finally:
        model.train(training)
    return Score(nats / tokens, hits / tokens, tokens)


class Collected(NamedTuple):
    """What every routed layer did with the T tokens of a text."""

    score: Score
    experts: list[Tensor]  # a layer: [T, k] int32 on the CPU, ids in the layer's pool
    chosen: list[Tensor]  # the same, -1 for a slot of weight zero, whose expert adds nothing
    gate_entropy: list[float]  # a layer: mean over tokens of the entropy of the gates, bits
    silent: list[float]  # a layer: fraction of tokens whose scores are all zero


def collect(model: nn.Module, layers: list[RoutedLayer], batches: Iterable[Tensor]) -> Collected:
    """Run `model` over `batches` and keep what its routers choose.

    The gates of a token are its scores divided by their sum: the softmax itself, or NormRouter's
    scores. Tokens without a positive score have no such distribution: they are counted as silent
    and left out of the entropy.
    """
    experts: list[list[Tensor]] = [[] for _ in layers]
    chosen: list[list[Tensor]] = [[] for _ in layers]
    bits, silent, seen = ([0.0] * len(layers) for _ in range(3))

    def watcher(position: int):
        def use(choice: Choice) -> None:
            ids = torch.tensor([*layers[position].visible, -1], dtype=torch.int32)  # -1 stays -1
            experts[position].append(ids[choice.experts.cpu()])
            idle = choice.weights.cpu() == 0
            chosen[position].append(experts[position][-1].masked_fill(idle, -1))
            speaking = choice.scores.sum(dim=1) > 0
            bits[position] += entropy(choice.scores).sum().item()
            silent[position] += int((~speaking).sum())
            seen[position] += speaking.numel()

        return use

    with contextlib.ExitStack() as stack:
        for position, layer in enumerate(layers):
            stack.enter_context(layer.watched(watcher(position)))
        result = score(model, batches)
    return Collected(
        result,
        [torch.cat(parts) for parts in experts],
        [torch.cat(parts) for parts in chosen],
        [b / max(1.0, n - s) for b, n, s in zip(bits, seen, silent, strict=True)],
        [s / n for s, n in zip(silent, seen, strict=True)],
    )
