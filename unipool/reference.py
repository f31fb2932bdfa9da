# SPDX-License-Identifier: Apache-2.0
"""The oracle: every op of `unipool.ops` in plain PyTorch, under the same name and signature.

Written to be read beside the equations of docs/math.md (numbers in brackets), not to be fast: it
loops over experts and keeps whole [T, M] tensors. Any float dtype; sums are float32, or float64 for
float64 inputs. Gradients come from ordinary autograd, so nothing here is shared with the ops.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from unipool.ops.dispatch import DispatchPlan
from unipool.ops.router import Routing


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (1). x: [T, D], weight: [M, D] -> [T, M]."""
    return _accumulator(x) @ _accumulator(weight).T


def norm_topk(
    logits: Tensor,
    scale: Tensor,
    top_k: int,
    *,
    calibration: float = 1.0,
    eps: float = 1e-8,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """NormRouter scores (2) and their top-k (4), with load and importance (5). logits: [T, M]."""
    z = _fill_masked(_accumulator(logits), mask, 0.0)
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    scores = scale.to(z.dtype) * calibration * torch.relu(z / (norm + eps))
    scores = _fill_masked(scores, mask, 0.0)
    experts = _choose(scores, top_k, bias, mask)
    weights = _gather(scores, experts)
    experts = experts.masked_fill(weights == 0, -1)  # silent slots
    return Routing(weights, experts, _load(experts, scores), scores.sum(0))


def softmax_topk(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """Softmax probabilities, their top-k (7), load and importance (5). logits: [T, M]."""
    if renormalize and top_k == 1:
        raise ValueError("softmax_topk: renormalize must be False for top_k = 1, got True")
    z = _fill_masked(_accumulator(logits), mask, -math.inf)
    scores = _fill_masked(torch.softmax(z, dim=-1), mask, 0.0)
    experts = _choose(scores, top_k, bias, mask)
    weights = _gather(scores, experts)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)  # 0 only where no expert is left
    return Routing(weights, experts, _load(experts, scores), scores.sum(0))


def recurrent_logits(
    x: Tensor, proj: Tensor, weight: Tensor, gru: dict[str, Tensor], state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [T, M] and next state [T, p] of one layer's recurrent router (11).

    x [T, D], proj A_l [p, D], weight W_l [M, p], state h_(l-1) [T, p] or None for zeros; gru: W_ih
    and W_hh [3p, p], b_ih and b_hh [3p] by torch.nn.GRUCell's names, rows in the order r, z, n.
    """
    u = _accumulator(x) @ _accumulator(proj).T
    h = torch.zeros_like(u) if state is None else state.to(u.dtype)
    w_r, w_z, w_n = gru["weight_ih"].to(u.dtype).chunk(3)
    u_r, u_z, u_n = gru["weight_hh"].to(u.dtype).chunk(3)
    b_r, b_z, b_n = gru["bias_ih"].to(u.dtype).chunk(3)
    c_r, c_z, c_n = gru["bias_hh"].to(u.dtype).chunk(3)
    r = torch.sigmoid(u @ w_r.T + b_r + h @ u_r.T + c_r)
    z = torch.sigmoid(u @ w_z.T + b_z + h @ u_z.T + c_z)
    n = torch.tanh(u @ w_n.T + b_n + r * (h @ u_n.T + c_n))
    h = (1 - z) * n + z * h
    return h @ _accumulator(weight).T, h


def dispatch_plan(experts: Tensor | Sequence[Tensor], num_experts: int) -> DispatchPlan:
    """Stable sort of the slots by expert. experts: [T, k] or one such tensor per layer."""
    if not isinstance(experts, Tensor):
        experts = torch.cat(list(experts))
    slots = experts.flatten().long()
    kept = (slots >= 0) & (slots < num_experts)
    order = torch.where(kept, slots, num_experts).argsort(stable=True)
    counts = torch.bincount(slots[kept], minlength=num_experts)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    rows = torch.arange(slots.numel(), device=slots.device)
    inverse = torch.empty_like(slots).scatter_(0, order, rows)
    return DispatchPlan(
        torch.where(rows < offsets[-1], order, -1).int(),
        torch.where(kept, inverse, -1).view(experts.shape).int(),
        offsets.int(),
    )


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows of x [T, D] in sorted order, [N, D]; zero past offsets[M]."""
    top_k = plan.inverse.shape[1]
    kept = (plan.order >= 0).unsqueeze(-1)
    tokens = plan.order.clamp(min=0).long() // top_k
    return torch.where(kept, x[tokens], 0.0)


def unpermute(y: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Sum of each token's rows of y [N, D], times weights [T, k] if given: [T, D]."""
    kept = (plan.inverse >= 0).unsqueeze(-1)
    rows = torch.where(kept, _accumulator(y)[plan.inverse.clamp(min=0).long()], 0.0)
    if weights is not None:
        rows = rows * torch.where(kept, weights.to(rows.dtype).unsqueeze(-1), 0.0)
    return rows.sum(1).to(y.dtype)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a [N, K], b [M, n, K] -> [N, n]: rows offsets[e]:offsets[e+1] of a times b[e]^T."""
    bounds = offsets.tolist()
    groups = [
        _accumulator(a[start:stop]) @ _accumulator(weight).T
        for (start, stop), weight in zip(pairwise(bounds), b.unbind(0), strict=True)
    ]
    tail = groups[0].new_zeros(a.shape[0] - bounds[-1], b.shape[1])
    return torch.cat([*groups, tail]).to(a.dtype)


def expert_mlp(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Output of one layer's experts (8). x [T, D], gate_up [M, 2F, D], down [M, D, F] -> [T, D]."""
    tokens = _accumulator(x)
    y = torch.zeros_like(tokens)
    for e, (w_in, w_out) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        token, slot = (routing.experts == e).nonzero(as_tuple=True)
        gate, up = (tokens[token] @ _accumulator(w_in).T).chunk(2, dim=-1)
        rows = (F.silu(gate) * up) @ _accumulator(w_out).T
        weight = routing.weights[token, slot].to(rows.dtype)
        y = y.index_add(0, token, weight.unsqueeze(-1) * rows)
    return y.to(x.dtype)


def balance_loss(
    routings: Sequence[Routing],
    top_k: int,
    coefficient: float,
    fraction: Tensor | None = None,
) -> Tensor:
    """Pool loss (6) of the layers that share a pool.

    fraction: f_e [M] of an earlier micro-batch (delay 1); None takes it from `routings` (delay 0).
    """
    tokens = max(sum(r.experts.shape[0] for r in routings), 1)
    importance = sum(r.importance for r in routings) / tokens
    if fraction is None:
        fraction = load_fraction(routings, top_k)
    return coefficient * importance.numel() * (fraction.to(importance.dtype) * importance).sum()


def load_fraction(routings: Sequence[Routing], top_k: int) -> Tensor:
    """f_e of (6): the share of all (token, slot) pairs that went to each expert, [M] float64."""
    slots = max(sum(r.experts.shape[0] for r in routings) * top_k, 1)
    return sum(r.load for r in routings).double() / slots


def norm_router_calibration(
    num_experts: int, top_k: int, *, draws: int = 1 << 17, seed: int = 0
) -> float:
    """Monte Carlo estimate of c(M, k) (3), float64, from the draws with a positive coordinate.

    Relative standard error about 0.2 / sqrt(draws) for M >= 64. For small M the density of the
    norm does not vanish at 0, the expectation diverges (as a logarithm) and no estimate settles.
    """
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    for chunk in torch.arange(draws).split(1 << 14):
        g = torch.randn(chunk.numel(), num_experts, generator=generator, dtype=torch.float64)
        unit = torch.relu(g / torch.linalg.vector_norm(g, dim=1, keepdim=True))
        norm = torch.linalg.vector_norm(unit.topk(top_k).values, dim=1)
        total += (1.0 / norm[norm > 0]).sum().item()
        count += int((norm > 0).sum())
    return total / count


def _accumulator(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _fill_masked(t: Tensor, mask: Tensor | None, value: float) -> Tensor:
    return t if mask is None else t.masked_fill(mask, value)


def _choose(scores: Tensor, top_k: int, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Ids [T, k] of the greatest s + bias (4): ties to the lower id, NaN greatest, -1 if spare."""
    num_experts = scores.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in [1, M={num_experts}], got {top_k}")
    key = scores.detach() if bias is None else scores.detach() + bias.to(scores.dtype)
    allowed = torch.arange(num_experts, device=scores.device)
    if mask is not None:
        allowed = allowed[~mask]
    ranked = key[:, allowed].sort(dim=-1, descending=True, stable=True).indices
    experts = allowed[ranked[:, :top_k]]
    return F.pad(experts, (0, top_k - experts.shape[1]), value=-1).int()


def _gather(scores: Tensor, experts: Tensor) -> Tensor:
    return torch.where(experts >= 0, scores.gather(1, experts.clamp(min=0).long()), 0.0)


def _load(experts: Tensor, scores: Tensor) -> Tensor:
    return torch.bincount(experts[experts >= 0].long(), minlength=scores.shape[1]).int()
