# SPDX-License-Identifier: Apache-2.0
"""Layers that share a pool, for the tests of the pool pass."""

from collections.abc import Callable

import devices
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unipool.nn import ExpertPool, NormRouter, pooled_moe

T, D, FF, M, K, L = 48, 16, 24, 6, 2, 4

MODES = ["deferred", "accumulate", "autograd"]

MERGED = MODES[:2]


class Stack(nn.Module):
    """Layers of router -> shared pool with a residual, as a model's root would run them."""

    def __init__(self, mode: str, layers: int = L, **options) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.pool = ExpertPool(M, D, FF, mode, **options)
        self.routers = nn.ModuleList(NormRouter(D, M, K) for _ in range(layers))
        self.use_reentrant: bool | None = None
        self.to(devices.current())

    def forward(self, x: Tensor) -> Tensor:
        experts = self.pool.begin_pass()
        for router in self.routers:

            def layer(h: Tensor, router: NormRouter = router) -> Tensor:
                normed = F.rms_norm(h, (D,))
                return h + pooled_moe(normed, router, experts)[0]

            x = layer(x) if self.use_reentrant is None else self.recomputed(layer, x)
        return x

    def recomputed(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=self.use_reentrant)


def inputs(seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, D, generator=generator).to(devices.current(), dtype).requires_grad_()


def loss_of(y: Tensor) -> Tensor:
    return (y.float() ** 2).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected(steps: int = 1, **options) -> dict[str, Tensor]:
    """Gradients of plain autograd after backward passes over `steps` micro-batches."""
    model = Stack("autograd", **options)
    for step in range(steps):
        loss_of(model(inputs(2 + step))).backward()
    return gradients(model)


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.norm() > 0, name
        error = ((got[name].double() - want.double()).norm() / want.double().norm()).item()
        assert error <= bound, f"{name}: {error:.1e}"
