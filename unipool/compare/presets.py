# SPDX-License-Identifier: Apache-2.0
"""The tables of arXiv:2605.06665 as grids, and the training that fits each scale."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

from unipool.compare.grid import Axes, Baseline, Size, Variant, distinct, grid, vanilla
from unipool.errors import InputError
from unipool.scales import find_scale

_POOL_SIZES = tuple(Size(fraction=f) for f in (0.416, 0.5, 0.667, 0.833, 1.0))


def _main(baseline: Baseline) -> list[Variant]:
    return grid(baseline, Axes(pool_size=(Size(count=baseline.unipool_experts),)))


def _sharing(baseline: Baseline) -> list[Variant]:
    divisors = [g for g in range(1, baseline.layers + 1) if baseline.layers % g == 0]
    return grid(baseline, Axes(pools=divisors))


def _pool_size(baseline: Baseline) -> list[Variant]:
    return grid(baseline, Axes(pool_size=_POOL_SIZES))


def _ablation(baseline: Baseline) -> list[Variant]:
    shared = Axes(router=("norm", "softmax"), balance=("pool", "layer"))
    private = Axes(pools=(baseline.layers,), balance=("layer",), delay=(0,))
    return grid(baseline, shared) + grid(baseline, private)


def _granularity(baseline: Baseline) -> list[Variant]:
    return grid(baseline, Axes(granularity=(1, 2, 4)))


def _delay(baseline: Baseline) -> list[Variant]:
    return grid(baseline, Axes(delay=(0, 1)))


def _routers(baseline: Baseline) -> list[Variant]:
    shared = Axes(router=("norm", "softmax", "recurrent", "recurrent-norm"))
    private = Axes(router=("recurrent",), pools=(baseline.layers,), balance=("layer",), delay=(0,))
    return grid(baseline, shared) + grid(baseline, private)


def _evidence(baseline: Baseline) -> list[Variant]:
    return _ablation(baseline) + grid(baseline, Axes(pool_size=(Size(fraction=0.5),)))


# name -> (what it asks, the models beside the layer-private baseline)
PRESETS: dict[str, tuple[str, Callable[[Baseline], list[Variant]]]] = {
    "main": ("does the scale's UniPool model beat the layer-private one?", _main),
    "sharing": ("G pools of equal size, from one for all layers to one per layer", _sharing),
    "pool-size": ("one pool of 41.6 % to 100 % of the baseline's experts", _pool_size),
    "ablation": ("NormRouter and pool loss, together and one without the other", _ablation),
    "granularity": ("experts cut in 1, 2 and 4, as many of them a token", _granularity),
    "delay": ("pool loss from this or the last micro-batch", _delay),
    "evidence": (
        "what docs/evidence.md holds against the paper: ablation and half a pool",
        _evidence,
    ),
    "routers": ("NormRouter, softmax and RMoE's recurrent router (arXiv:2408.06793)", _routers),
}


def training(scale: str, **given) -> dict:
    """Options of TrainConfig that every model of a sweep has in common: `given`, the scale's own
    for the rest, and no validation before the last step."""
    options = asdict(find_scale(scale).recipe) | {"eval_every": 0, "keep": 1} | given
    return {"min_lr": options["lr"] / 10} | options


def preset_variants(names: Iterable[str], baseline: Baseline) -> list[Variant]:
    """The models of all these presets, without the baselines. InputError for an unknown name."""
    variants = []
    for name in names:
        if name not in PRESETS:
            raise InputError(f"--preset must be among {', '.join(PRESETS)}, got {name}")
        variants += PRESETS[name][1](baseline)
    return distinct(variants)


def with_baselines(variants: list[Variant], baseline: Baseline) -> list[Variant]:
    """The layer-private model of every granularity among `variants` first, then they."""
    sizes = dict.fromkeys(variant.granularity for variant in variants)
    return distinct([*(vanilla(baseline, g) for g in sizes), *variants])
