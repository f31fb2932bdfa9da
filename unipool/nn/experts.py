# SPDX-License-Identifier: Apache-2.0
"""The pool of experts, and a layer's use of it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unipool.nn.pool_pass import WEIGHT_GRADS, PoolPass
from unipool.ops import Routing


class ExpertPool(nn.Module):
    """M SwiGLU experts that any number of layers may share.

    Own it once, at the root of the model, and hand it to layers as an argument: registered in each
    layer, its weights would be saved, sharded and counted once per layer. The layout is the one of
    transformers' experts, so weights move both ways without a copy.

    Args:
        num_experts: M.
        d_model: D.
        d_ff: F, the width of one expert.
        weight_grad: how a pass (begin_pass) forms the weights' gradient over its layers.
            "deferred": one grouped product over the rows of all layers, after the last of them;
            "accumulate": each layer adds to a float32 sum, touching only experts with tokens;
            "autograd": each layer returns a dense gradient and autograd adds them up.
        wgrad_window_bytes: how much "deferred" holds before it adds what it has to a float32 sum
            and goes on; None takes a quarter of the memory that is free when a pass begins.

    Attributes:
        gate_up_proj: [M, 2F, D], gate rows first.
        down_proj: [M, D, F].
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        weight_grad: str = "deferred",
        *,
        wgrad_window_bytes: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        sizes = {"num_experts": num_experts, "d_model": d_model, "d_ff": d_ff}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"ExpertPool: {name} must be at least 1, got {size}")
        if weight_grad not in WEIGHT_GRADS:
            raise ValueError(
                f"ExpertPool: weight_grad must be one of {', '.join(WEIGHT_GRADS)}, "
                f"got {weight_grad!r}"
            )
        if wgrad_window_bytes is not None and wgrad_window_bytes < 0:
            raise ValueError(
                f"ExpertPool: wgrad_window_bytes must not be negative, got {wgrad_window_bytes}"
            )
        super().__init__()
        self.weight_grad, self.wgrad_window_bytes = weight_grad, wgrad_window_bytes
        self.num_experts, self.d_model, self.d_ff = num_experts, d_model, d_ff
        options = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model, **options))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ff, **options))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Normal weights; std defaults to 1 / sqrt(fan-in) of each matrix."""
        nn.init.normal_(self.gate_up_proj, std=self.d_model**-0.5 if std is None else std)
        nn.init.normal_(self.down_proj, std=self.d_ff**-0.5 if std is None else std)

    def begin_pass(self) -> PoolPass:
        """The pool for one forward pass: hand it to the layers instead of the pool itself.

        Call it once per micro-batch at the root of the model, outside any recomputed region, and
        within autocast if that is used. Passes are independent of each other. The same as calling
        the pool without arguments, so that what works by hooks of modules (sharding, offloading)
        has the weights in place.
        """
        return self()

    def forward(self, x: Tensor | None = None, routing: Routing | None = None) -> Tensor | PoolPass:
        """Without arguments a pass; x [T, D] and its Routing -> [T, D] is a single layer's use."""
        if (x is None) != (routing is None):
            raise TypeError("ExpertPool: give both x and routing, or neither to begin a pass")
        if x is not None:
            return PoolPass(self.gate_up_proj, self.down_proj, "autograd", None)(x, routing)
        return PoolPass(
            self.gate_up_proj,
            self.down_proj,
            self.weight_grad,
            self.wgrad_window_bytes,
            own=_frees_weights(self),
        )

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, d_model={self.d_model}, d_ff={self.d_ff}, "
            f"weight_grad={self.weight_grad!r}"
        )


def _frees_weights(pool: ExpertPool) -> bool:
    """Whether FSDP2 frees the pool's gathered weights when its forward ends, before the layers."""
    state = pool._get_fsdp_state() if hasattr(pool, "_get_fsdp_state") else None
    group = getattr(state, "_fsdp_param_group", None)
    return group is not None and group.post_forward_mesh_info is not None


def pooled_moe(
    x: Tensor, router: Callable[[Tensor], Routing], experts: ExpertPool | PoolPass
) -> tuple[Tensor, Routing]:
    """One MoE layer on a shared pool; pure, so it may be recomputed under gradient checkpointing.

    Args:
        x: [..., D].
        router: any callable from [T, D] to Routing over the pool's experts.
        experts: the pool, or the pass it began.

    Returns:
        y [..., D] and the Routing of the T tokens, for the balance loss at the root of the model.
    """
    tokens = x.reshape(-1, x.shape[-1])
    routing = router(tokens)
    return experts(tokens, routing).reshape(x.shape), routing
