# SPDX-License-Identifier: Apache-2.0
"""All the statistics of one model over one text: numbers for people, arrays for programs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unipool.analysis.collect import Collected, RoutedLayer, collect, routed_layers
from unipool.analysis.metrics import (
    cross_layer,
    entropy,
    expert_load,
    gini,
    mean_off_diagonal,
    weight_similarity,
)


@dataclass(frozen=True)
class Analysis:
    """numbers: plain values, as JSON holds them. arrays: by name, see `analyze`."""

    numbers: dict
    arrays: dict[str, np.ndarray]


def analyze(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    shuffles: int = 3,
    seed: int = 0,
) -> Analysis:
    """Run `model` over `batches` of ids [B, S] and describe its routing.

    arrays (L MoE layers, M experts at most): load [L, M] int64, -1 for experts that a layer does
    not see; layers, pools [L]; jaccard, jaccard_shuffled, information, information_shuffled [L, L]
    (bits; NaN where undefined); similarity_<pool> [M, M], the cosines of the pool's experts.
    The load is the one that the model itself counts. Layers are compared by the experts that get a
    weight above zero: what a NormRouter without a positive score falls back on is not a choice.
    Raises InputError for a model without MoE layers.
    """
    layers = routed_layers(model)
    collected = collect(model, layers, batches)
    sizes = [layer.num_experts for layer in layers]
    loads = [expert_load(e, m) for e, m in zip(collected.experts, sizes, strict=True)]
    crossed = cross_layer(collected.chosen, [layer.pool for layer in layers], sizes, shuffles, seed)
    similarity = {
        layer.pool: weight_similarity(layer.experts.gate_up_proj, layer.experts.down_proj)
        for layer in {layer.pool: layer for layer in layers}.values()
    }
    numbers = {
        "model": type(model).__name__,
        "loss": collected.score.loss,
        "accuracy": collected.score.accuracy,
        "tokens": len(collected.experts[0]),
        "shuffles": shuffles,
        "seed": seed,
        "layers": _layer_rows(layers, loads, collected),
        "pools": _pool_rows(layers, loads, similarity),
        "cross_layer": {
            name: mean_off_diagonal(matrix) for name, matrix in crossed._asdict().items()
        },
    }
    arrays = {
        "layers": np.array([layer.index for layer in layers]),
        "pools": np.array([layer.pool for layer in layers]),
        "load": _load_table(layers, loads),
        **{name: matrix.numpy() for name, matrix in crossed._asdict().items()},
        **{f"similarity_{pool}": matrix.numpy() for pool, matrix in similarity.items()},
    }
    return Analysis(numbers, arrays)


def _layer_rows(layers: list[RoutedLayer], loads: list[Tensor], collected: Collected) -> list[dict]:
    rows = []
    for position, (layer, load) in enumerate(zip(layers, loads, strict=True)):
        gate = collected.gate_entropy[position]
        rows.append(
            {
                "layer": layer.index,
                "pool": layer.pool,
                "router": type(layer.router).__name__,
                "experts": len(layer.visible),
                "top_k": layer.top_k,
                "gate_entropy": gate,
                "gate_effective": 2.0**gate,
                "silent": collected.silent[position],
                **_load_numbers(load[list(layer.visible)]),
                "scale": layer.scale,
                "calibration": getattr(layer.router, "calibration", None),
            }
        )
    return rows


def _load_numbers(load: Tensor) -> dict:
    bits = entropy(load).item()
    return {
        "load_entropy": bits,
        "load_effective": 2.0**bits,
        "gini": gini(load),
        "dead": int((load == 0).sum()),
    }


def _pool_rows(
    layers: list[RoutedLayer], loads: list[Tensor], similarity: dict[int, Tensor]
) -> list[dict]:
    rows = []
    for pool, matrix in similarity.items():
        members = [i for i, layer in enumerate(layers) if layer.pool == pool]
        load = torch.stack([loads[i] for i in members]).sum(0)
        rows.append(
            {
                "pool": pool,
                "layers": [layers[i].index for i in members],
                "experts": len(load),
                **_load_numbers(load),
                "dead_experts": (load == 0).nonzero().flatten().tolist(),
                "similarity": mean_off_diagonal(matrix),
            }
        )
    return rows


def _load_table(layers: list[RoutedLayer], loads: list[Tensor]) -> np.ndarray:
    """[L, M] int64; -1 for the experts that a layer does not see."""
    width = max(layer.num_experts for layer in layers)
    table = np.full((len(layers), width), -1, dtype=np.int64)
    for row, layer, load in zip(table, layers, loads, strict=True):
        visible = list(layer.visible)
        row[visible] = load[visible].numpy()
    return table
