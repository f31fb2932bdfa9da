# SPDX-License-Identifier: Apache-2.0
"""A router that remembers, for each token, how the layers below it routed (RMoE)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unipool.nn.router import (
    check_sizes,
    new_scale,
    norm_router_calibration,
    norm_routing,
    wide_logits,
)
from unipool.ops import Routing, softmax_topk

SCORINGS = ("softmax", "norm")


def gru_step(cell: nn.GRUCell, u: Tensor, h: Tensor) -> Tensor:
    """The next state of `cell` for input u and state h, both [T, p], in their dtype.

    Written out because autocast would run the cell in half precision, and because the fused cell of
    CUDA has no shape function, without which torch.compile cannot trace it.
    """
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    parameters = (getattr(cell, name) for name in names)
    w_ih, w_hh, b_ih, b_hh = (None if p is None else p.to(u.dtype) for p in parameters)
    with torch.autocast(u.device.type, enabled=False):
        reset_u, update_u, new_u = F.linear(u, w_ih, b_ih).chunk(3, dim=1)
        reset_h, update_h, new_h = F.linear(h, w_hh, b_hh).chunk(3, dim=1)
        update = torch.sigmoid(update_u + update_h)
        new = torch.tanh(new_u + torch.sigmoid(reset_u + reset_h) * new_h)
        return new + update * (h - new)


class RecurrentRouter(nn.Module):
    """z = h W^T with h = GRU(x A^T, h of the layer below), then softmax or NormRouter scores.

    The recurrence of RMoE (arXiv:2408.06793), equation (11) of docs/math.md: it runs over the
    layers of one token, not over time. Each layer owns its A and W; all layers share one GRUCell,
    which the root of the model owns and hands to them. Everything is computed in float32 (float64
    for float64 inputs), also under autocast and with narrower parameters.

    Args:
        d_model: D.
        num_experts: M of the pool.
        top_k: experts per token, at most min(M, 16).
        d_state: p, the width of the state.
        scoring: "softmax", as published, or "norm", the scores of NormRouter.
        renormalize: with "softmax", divide the k weights by their sum; refused for top_k = 1, where
            the router would get no gradient from the task.
        eps: with "norm", guards rows of zeros.

    Attributes:
        proj: its weight is A, [p, D].
        weight: W, [M, p].
        scale: with "norm", as in NormRouter; else None.
        calibration: with "norm", as in NormRouter; else None.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        d_state: int,
        scoring: str = "softmax",
        *,
        renormalize: bool = False,
        eps: float = 1e-8,
        device=None,
        dtype=None,
    ) -> None:
        check_sizes("RecurrentRouter", d_model, num_experts, top_k)
        if d_state < 1:
            raise ValueError(f"RecurrentRouter: d_state must be at least 1, got {d_state}")
        if scoring not in SCORINGS:
            raise ValueError(
                f"RecurrentRouter: scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}"
            )
        if renormalize and (scoring != "softmax" or top_k == 1):
            raise ValueError(
                "RecurrentRouter: renormalize must be False unless scoring is softmax and top_k "
                f"is at least 2, got True with scoring={scoring!r}, top_k={top_k}"
            )
        super().__init__()
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.d_state, self.scoring = d_state, scoring
        self.renormalize, self.eps = renormalize, eps
        self.proj = nn.Linear(d_model, d_state, bias=False, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(num_experts, d_state, device=device, dtype=dtype))
        self.calibration = self.scale = None
        if scoring == "norm":
            self.calibration = norm_router_calibration(num_experts, top_k)
            self.scale = new_scale(self, device)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Normal weights; std defaults to 1 / sqrt(fan-in) of each matrix."""
        nn.init.normal_(self.proj.weight, std=self.d_model**-0.5 if std is None else std)
        nn.init.normal_(self.weight, std=self.d_state**-0.5 if std is None else std)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(
        self,
        x: Tensor,
        cell: nn.GRUCell,
        state: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Routing, Tensor]:
        """Route the tokens of one layer.

        Args:
            x: [T, D].
            cell: the GRUCell(p, p) of all layers.
            state: [T, p] as the layer below returned it for the same tokens; None (zeros) in the
                lowest layer.
            mask: [M] bool, True hides an expert.

        Returns:
            The Routing, and the state [T, p] for the layer above: float32, or float64 for
            float64 x.
        """
        logits, state = self.logits(x, cell, state)
        return self._score(logits, mask), state

    def bind(self, cell: nn.GRUCell, state: Tensor | None = None) -> "BoundRouter":
        """This router as `pooled_moe` takes one, for a single layer; arguments as for forward."""
        return BoundRouter(self, cell, state)

    def logits(
        self, x: Tensor, cell: nn.GRUCell, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is scored: z [T, M], and the next state [T, p]; arguments as for forward."""
        self._check(x, cell, state)
        u = wide_logits(x, self.proj.weight)
        h = torch.zeros_like(u) if state is None else state.to(u.dtype)
        h = gru_step(cell, u, h)
        return wide_logits(h, self.weight), h

    def _score(self, logits: Tensor, mask: Tensor | None) -> Routing:
        if self.scoring == "softmax":
            return softmax_topk(logits, self.top_k, renormalize=self.renormalize, mask=mask)
        return norm_routing(self, logits, mask)

    def _check(self, x: Tensor, cell: nn.GRUCell, state: Tensor | None) -> None:
        if x.dim() != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"RecurrentRouter: x must be [T, {self.d_model}], got {list(x.shape)}")
        if not isinstance(cell, nn.GRUCell):
            raise TypeError(
                f"RecurrentRouter: cell must be a torch.nn.GRUCell, got {type(cell).__name__}"
            )
        if not cell.input_size == cell.hidden_size == self.d_state:
            raise ValueError(
                f"RecurrentRouter: cell must be GRUCell({self.d_state}, {self.d_state}), "
                f"got GRUCell({cell.input_size}, {cell.hidden_size})"
            )
        if state is not None and state.shape != (x.shape[0], self.d_state):
            raise ValueError(
                f"RecurrentRouter: state must be [T={x.shape[0]}, {self.d_state}], "
                f"got {list(state.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"d_state={self.d_state}, scoring={self.scoring!r}"
        )


class BoundRouter:
    """A RecurrentRouter with the cell and the state that it routes the tokens of one layer with.

    state: [T, p] of the layer below, or None; after the call, that for the layer above.
    """

    def __init__(self, router: RecurrentRouter, cell: nn.GRUCell, state: Tensor | None) -> None:
        self.router, self.cell, self.state = router, cell, state

    def __call__(self, x: Tensor) -> Routing:
        routing, self.state = self.router(x, self.cell, self.state)
        return routing
