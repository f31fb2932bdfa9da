# SPDX-License-Identifier: Apache-2.0
"""The models of a sweep: what may vary between them, and the grids of it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from unipool.errors import InputError
from unipool.models import preset
from unipool.models.configuration_unipool import BALANCES
from unipool.models.presets import VANILLA_COEFFICIENT
from unipool.nn.recurrent import SCORINGS
from unipool.scales import find_scale

# In a grid, the recurrent router with NormRouter's scoring is a router of its own.
ROUTERS = {
    "norm": {"router": "norm"},
    "softmax": {"router": "softmax"},
    "recurrent": {"router": "recurrent", "router_scoring": SCORINGS[0]},
    "recurrent-norm": {"router": "recurrent", "router_scoring": SCORINGS[1]},
}


@dataclass(frozen=True)
class Baseline:
    """Sizes of the layer-private model of a scale, which a sweep is measured against."""

    scale: str
    layers: int  # L
    layer_experts: int  # E, the experts of a layer
    d_ff: int  # F, the width of one
    unipool_experts: int  # M of the scale's UniPool model
    pool_coefficient: float  # of the pool loss

    @classmethod
    def of(cls, scale: str) -> "Baseline":
        """InputError for an unknown scale."""
        find_scale(scale)
        vanilla, unipool = preset(scale, "vanilla"), preset(scale, "unipool")
        return cls(
            scale,
            vanilla.num_hidden_layers,
            vanilla.num_experts,
            vanilla.intermediate_size,
            unipool.num_experts,
            unipool.balance_coefficient,
        )

    @property
    def experts(self) -> int:
        """L E: experts in the whole model."""
        return self.layers * self.layer_experts


@dataclass(frozen=True)
class Variant:
    """One model of a sweep, but for its seed.

    pools G, each of `pool_size` experts M; granularity g: an expert is the g-th part of the
    baseline's, F / g wide, and a token takes g of them, so that as many parameters are active.
    """

    router: str
    pools: int
    pool_size: int
    balance: str
    delay: int
    granularity: int

    @property
    def name(self) -> str:
        """Unique among the variants of a sweep, and fit for a folder."""
        balance = self.balance if self.balance == "none" else f"{self.balance}{self.delay}"
        return f"{self.router}-{self.pools}x{self.pool_size}-k{self.granularity}-{balance}"

    def options(self, baseline: Baseline) -> dict:
        """The fields of TrainConfig that make this variant at the baseline's scale."""
        pooled = self.balance == "pool"
        return {
            "form": "unipool",
            "scale": baseline.scale,
            "num_pools": self.pools,
            "pool_size": self.pool_size,
            "top_k": self.granularity,
            "d_ff": baseline.d_ff // self.granularity,
            "balance": self.balance,
            "balance_delay": self.delay,
            "balance_coefficient": baseline.pool_coefficient if pooled else VANILLA_COEFFICIENT,
        } | ROUTERS[self.router]


def vanilla(baseline: Baseline, granularity: int = 1) -> Variant:
    """The layer-private model: softmax router, one balance loss per layer from its own batch."""
    experts = baseline.layer_experts * granularity
    return Variant("softmax", baseline.layers, experts, "layer", 0, granularity)


@dataclass(frozen=True)
class Size:
    """Experts M of one pool: a number, or a part of the baseline's experts over all G pools."""

    count: int | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Size":
        """ "24", or "41.6%"; InputError for anything else."""
        try:
            if text.endswith("%"):
                size = cls(fraction=float(text[:-1]) / 100)
                usable = 0 < size.fraction < 100
            else:
                size = cls(count=int(text))
                usable = size.count >= 1
        except ValueError:
            usable = False
        if not usable:
            raise InputError(
                "--pool-size must be a number of experts such as 24, or a part of the baseline's "
                f"such as 50%, got {text!r}"
            )
        return size

    def experts(self, baseline: Baseline, pools: int, granularity: int) -> int:
        """M, at least 1; the nearest number to the part asked for."""
        if self.count is not None:
            return self.count
        return max(1, round(self.fraction * baseline.experts * granularity / pools))


@dataclass(frozen=True)
class Axes:
    """The values of each axis of a grid; by default one point, the full shared pool."""

    router: Sequence[str] = ("norm",)
    pools: Sequence[int] = (1,)
    pool_size: Sequence[Size] = (Size(fraction=1.0),)
    balance: Sequence[str] = ("pool",)
    delay: Sequence[int] = (1,)
    granularity: Sequence[int] = (1,)


def grid(baseline: Baseline, axes: Axes) -> list[Variant]:
    """Every combination of the axes, each once. InputError, in one line, for a value unknown."""
    for name, known in (("router", tuple(ROUTERS)), ("balance", BALANCES), ("delay", (0, 1))):
        for value in getattr(axes, name):
            if value not in known:
                allowed = ", ".join(map(str, known))
                raise InputError(f"--{name} must be among {allowed}, got {value}")
    for value in axes.pools:
        if not 1 <= value <= baseline.layers:
            raise InputError(
                f"--pools must be in [1, {baseline.layers}], the layers of --scale "
                f"{baseline.scale}, got {value}"
            )
    for value in axes.granularity:
        if value < 1 or baseline.d_ff % value:
            raise InputError(
                f"--granularity must divide {baseline.d_ff}, the width of an expert of --scale "
                f"{baseline.scale}, got {value}"
            )
    return distinct(_combine(baseline, axes))


def _combine(baseline: Baseline, axes: Axes) -> Iterator[Variant]:
    for g, router, pools, size, balance, delay in itertools.product(
        axes.granularity, axes.router, axes.pools, axes.pool_size, axes.balance, axes.delay
    ):
        experts = size.experts(baseline, pools, g)
        # Without a balance loss there is nothing to be late.
        yield Variant(router, pools, experts, balance, 0 if balance == "none" else delay, g)


def distinct(variants: Iterable[Variant]) -> list[Variant]:
    """Each variant once, in the order of first appearance."""
    return list(dict.fromkeys(variants))
