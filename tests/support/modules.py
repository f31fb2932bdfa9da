# SPDX-License-Identifier: Apache-2.0
"""Modules that several tests use."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unipool import ops
from unipool.nn import (
    ExpertPool,
    NormRouter,
    PoolBalancer,
    pooled_moe,
)


class SharedPool(nn.Module):
    """L layers, each with its own router, on one pool owned by the root."""

    def __init__(self, layers: int = 3, checkpoint: str | None = None) -> None:
        super().__init__()
        self.pool = ExpertPool(8, 16, 12)
        self.routers = nn.ModuleList(NormRouter(16, 8, 2) for _ in range(layers))
        self.balancer = PoolBalancer(8, 0.01)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routings = []
        for router in self.routers:
            if self.checkpoint is None:
                y, *routing = self.layer(x, router)
            else:
                reentrant = self.checkpoint == "reentrant"
                y, *routing = checkpoint(self.layer, x, router, use_reentrant=reentrant)
            x = x + y
            routings.append(ops.Routing(*routing))
        return x, self.balancer(routings, 2)

    def layer(self, x: Tensor, router: nn.Module) -> tuple[Tensor, ...]:
        """Flat: reentrant checkpointing sees no gradient inside a nested tuple."""
        y, routing = pooled_moe(x, router, self.pool)
        return y, *routing


def layers(device, tokens: int = 20, count: int = 3, seed: int = 0) -> list[ops.Routing]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ops.softmax_topk(torch.randn(tokens, 8, generator=generator).to(device).requires_grad_(), 2)
        for _ in range(count)
    ]
