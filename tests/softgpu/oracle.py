# SPDX-License-Identifier: Apache-2.0
"""What the kernels should give, in float64 and plain PyTorch; gradients come from autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_scores(
    z: Tensor, scale: Tensor, calibration: float, eps: float, mask: Tensor | None
) -> Tensor:
    """[T, M] scores s = scale * calibration * relu(z / (|z| + eps)); 0 where masked."""
    z = z if mask is None else z.masked_fill(mask, 0.0)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return scale.double() * calibration * torch.relu(z / (norm + eps))


def softmax_scores(z: Tensor, mask: Tensor | None) -> Tensor:
    """[T, M] probabilities; 0 where masked."""
    if mask is None:
        return torch.softmax(z, dim=1)
    if mask.all():
        return z * 0.0
    return torch.softmax(z.masked_fill(mask, -torch.inf), dim=1).masked_fill(mask, 0.0)


def choose(
    scores: Tensor,
    top_k: int,
    bias: Tensor | None,
    mask: Tensor | None,
    silent: bool = False,
) -> Tensor:
    """[T, k] ids: greatest score + bias first, NaN greatest, ties to the lower id, spare -1; with
    `silent`, as for NormRouter, also -1 where the score is 0."""
    key = scores.detach() if bias is None else scores.detach() + bias.double()
    ids = torch.arange(scores.shape[1])
    if mask is not None:
        ids = ids[~mask]
    ranked = ids[key[:, ids].sort(dim=1, descending=True, stable=True).indices[:, :top_k]]
    spare = top_k - ranked.shape[1]
    chosen = torch.nn.functional.pad(ranked, (0, spare), value=-1)
    return chosen.masked_fill(silent & (weights_of(scores, chosen) == 0), -1).int()


def weights_of(scores: Tensor, experts: Tensor, renormalize: bool = False) -> Tensor:
    """[T, k] scores of the chosen experts, 0 for a spare slot."""
    w = scores.gather(1, experts.clamp(min=0).long())
    w = torch.where(experts >= 0, w, 0.0)
    if renormalize:
        total = w.sum(1, keepdim=True)
        w = w / torch.where(total == 0, 1.0, total)
    return w


def load_of(experts: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(experts[experts >= 0].long(), minlength=num_experts).int()


def dispatch_plan(experts: Sequence[Tensor], num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [N], inverse [N], offsets [M + 1]"""
    ids = torch.cat([e.flatten() for e in experts]).long()
    kept = (ids >= 0) & (ids < num_experts)
    slots = torch.where(kept, ids, num_experts).argsort(stable=True)
    rows = torch.empty_like(slots)
    rows[slots] = torch.arange(len(slots))
    count = int(kept.sum())
    order = slots.clone()
    order[count:] = -1
    loads = torch.bincount(ids[kept], minlength=num_experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), loads.cumsum(0)])
    return order.int(), torch.where(kept, rows, -1).int(), offsets.int()


def unpermute(y: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """[T, D] in float64; differentiable in y and weights."""
    kept = (inverse >= 0).unsqueeze(-1)
    rows = torch.where(kept, y[inverse.clamp(min=0).long()], 0.0)
    if weights is not None:
        rows = rows * torch.where(kept, weights.unsqueeze(-1), 0.0)
    return rows.sum(1)
