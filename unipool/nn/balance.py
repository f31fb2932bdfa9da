# SPDX-License-Identifier: Apache-2.0
"""The load-balance loss of a pool, over all layers that share it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipool.ops import Routing


@torch.library.custom_op("unipool::snapshot", mutates_args=())
def _snapshot(x: Tensor) -> Tensor:
    """A copy that torch.compile takes when it is asked for. An ordinary clone it may recompute in
    the backward, from a buffer that has been overwritten since: silently wrong gradients."""
    return x.clone()


@_snapshot.register_fake
def _(x):
    return torch.empty_like(x)


class PoolBalancer(nn.Module):
    """loss = coefficient * M * sum_e f_e P_e (UniPool, arXiv:2605.06665; Shazeer et al. 2017).

    f_e is the fraction of all (token, slot) pairs of all layers that expert e got, without
    gradient; P_e its mean importance over tokens and layers. Call it once per micro-batch at the
    root of the model, outside any recomputed region: the state then cannot be counted twice.

    Args:
        num_experts: M.
        coefficient: alpha.
        delay: 0 takes f from the same call; 1 from the previous call that trained (the paper's
            choice; the loss of the very first call is zero).

    Attributes:
        fraction: [M] float32 persistent buffer, f of the last call that trained: in training mode,
            with gradients enabled, on at least one token. Generating does not move it.
    """

    fraction: Tensor

    def __init__(self, num_experts: int, coefficient: float, delay: int = 1) -> None:
        if num_experts < 1:
            raise ValueError(f"PoolBalancer: num_experts must be at least 1, got {num_experts}")
        if not 0 <= coefficient < float("inf"):
            raise ValueError(
                f"PoolBalancer: coefficient must be finite and not negative, got {coefficient}"
            )
        if delay not in (0, 1):
            raise ValueError(f"PoolBalancer: delay must be 0 or 1, got {delay}")
        super().__init__()
        self.num_experts, self.coefficient, self.delay = num_experts, coefficient, delay
        self.register_buffer("fraction", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, routings: Sequence[Routing], top_k: int) -> Tensor:
        """The routings of the layers that share the pool, k experts per token -> scalar loss."""
        self._check(routings, top_k)
        seen = sum(routing.experts.shape[0] for routing in routings)
        tokens = max(1, seen)
        load = torch.stack([routing.load for routing in routings]).sum(0)
        importance = torch.stack([routing.importance for routing in routings]).sum(0)
        fraction = load.float() / (tokens * top_k)
        # A copy: the buffer is overwritten below, before the backward reads it.
        used = fraction if self.delay == 0 else _snapshot(self.fraction)
        if self.training and torch.is_grad_enabled() and seen:
            self.fraction.copy_(fraction)
        mean_importance = importance / tokens
        return self.coefficient * self.num_experts * (used * mean_importance).sum()

    def _check(self, routings: Sequence[Routing], top_k: int) -> None:
        if len(routings) == 0:
            raise ValueError("PoolBalancer: routings must have at least one layer, got none")
        for layer, routing in enumerate(routings):
            if routing.load.shape[0] != self.num_experts:
                raise ValueError(
                    f"PoolBalancer: routings[{layer}] must be over M={self.num_experts} experts, "
                    f"got {routing.load.shape[0]}"
                )
            if routing.experts.shape[1] != top_k:
                raise ValueError(
                    f"PoolBalancer: routings[{layer}] must have top_k={top_k} experts per token, "
                    f"got {routing.experts.shape[1]}"
                )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, coefficient={self.coefficient}, delay={self.delay}"
