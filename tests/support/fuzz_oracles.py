# SPDX-License-Identifier: Apache-2.0
"""What each raw op must return, in float64, with a bound for each result.

The arguments come under the op's own names, floats in float64. A bound is a Tolerance
(tolerance.py) whose magnitude is the root of the sum of the squares of what a result adds up: the
errors of the terms grow so, also where the terms themselves cancel.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unipool import reference


class Due(NamedTuple):
    """A result: its value; length of its sums, roundings to the dtype; what it may cancel from."""

    value: Tensor
    reduction: int = 0
    roundings: int = 0
    magnitude: Tensor | float = 0.0


def product(a: Tensor, b: Tensor, reduction: int, roundings: int) -> Due:
    """a b and its magnitude."""
    return Due(a @ b, reduction, roundings, (a.square() @ b.square()).sqrt())


# --- routers


def router_logits(x: Tensor, weight: Tensor) -> list[Due]:
    return [product(x, weight.T, x.shape[1], 0)]


def router_logits_bwd(grad: Tensor, x: Tensor, weight: Tensor) -> list[Due]:
    T, M = grad.shape
    return [product(grad, weight, M, 1), product(grad.T, x, T, 1)]


def _routing(routing: reference.Routing, logits: Tensor) -> list[Due]:
    T, M = logits.shape
    weights, experts, load, importance = routing
    return [Due(weights, M), Due(experts), Due(load), Due(importance, T + M)]


def norm_topk(logits, scale, top_k, calibration, eps, bias, mask) -> list[Due]:
    options = {"calibration": calibration, "eps": eps, "bias": bias, "mask": mask}
    return _routing(reference.norm_topk(logits, scale.reshape(()), top_k, **options), logits)


def softmax_topk(logits, top_k, renormalize, bias, mask) -> list[Due]:
    options = {"renormalize": renormalize, "bias": bias, "mask": mask}
    return _routing(reference.softmax_topk(logits, top_k, **options), logits)


def _pull_back(scores: Tensor, chosen: Tensor, grads: tuple, into: list[Tensor]) -> list[Tensor]:
    """Gradients of <grad_weights, chosen> + <grad_importance, sum of scores over tokens>."""
    terms = (chosen, scores.sum(0))
    loss = sum((g * t).sum() for g, t in zip(grads, terms, strict=True) if g is not None)
    if not isinstance(loss, Tensor):
        return [torch.zeros_like(t) for t in into]
    return list(torch.autograd.grad(loss, into))


def _kept(scores: Tensor, experts: Tensor) -> Tensor:
    return (experts >= 0) & (experts < scores.shape[1])


def _of_kept(grad_weights: Tensor | None, scores: Tensor, experts: Tensor) -> Tensor | None:
    """A dropped slot passes nothing on, whatever comes."""
    return None if grad_weights is None else torch.where(_kept(scores, experts), grad_weights, 0.0)


def _take(scores: Tensor, experts: Tensor) -> Tensor:
    kept = _kept(scores, experts)
    return torch.where(kept, scores.gather(1, torch.where(kept, experts, 0).long()), 0.0)


def _greatest(*grads: Tensor | None) -> float:
    return sum(float(g.abs().max()) for g in grads if g is not None and g.numel())


def norm_topk_bwd(
    grad_weights, grad_importance, logits, scale, experts, calibration, eps, mask
) -> list[Due]:
    z, sigma = logits.clone().requires_grad_(), scale.clone().requires_grad_()
    free = z if mask is None else z.masked_fill(mask, 0.0)
    norm = torch.linalg.vector_norm(free, dim=-1, keepdim=True)
    scores = sigma.reshape(()) * calibration * torch.relu(free / (norm + eps))
    chosen = _take(scores, experts)
    grads = (_of_kept(grad_weights, scores, experts), grad_importance)
    grad_logits, grad_scale = _pull_back(scores, chosen, grads, [z, sigma])
    size = _greatest(*grads) * calibration * scale.abs().reshape(()) / (norm.detach() + eps)
    size = torch.where((free > 0).any(-1, keepdim=True), size, 0.0).expand_as(logits)
    whole = tuple(None if g is None else g.abs() for g in grads)
    return [
        Due(grad_logits, logits.shape[1], 1, size),
        Due(grad_scale, logits.numel(), 0, _sum_of_scores(scores, chosen, whole) / scale.abs()),
    ]


def _sum_of_scores(scores: Tensor, chosen: Tensor, grads: tuple) -> Tensor:
    terms = (chosen.detach(), scores.detach().sum(0))
    parts = [(g * t.abs()).sum() for g, t in zip(grads, terms, strict=True) if g is not None]
    return torch.stack([*parts, scores.new_zeros(())]).sum().detach()


def softmax_topk_bwd(
    grad_weights, grad_importance, logits, experts, renormalize, mask
) -> list[Due]:
    z = logits.clone().requires_grad_()
    free = z if mask is None else z.masked_fill(mask, -torch.inf)
    scores = torch.softmax(free, -1)
    scores = scores if mask is None else scores.masked_fill(mask, 0.0)
    chosen = _take(scores, experts)
    if renormalize:
        total = chosen.sum(-1, keepdim=True)
        chosen = chosen / torch.where(total == 0, 1.0, total)
    grads = (_of_kept(grad_weights, scores, experts), grad_importance)
    (grad,) = _pull_back(scores, chosen, grads, [z])
    greatest = scores.detach().nan_to_num(0.0).amax(-1, keepdim=True)
    size = _greatest(*grads) * (1.0 if renormalize else greatest)
    return [Due(grad, logits.shape[1], 1, torch.as_tensor(size).double().expand_as(grad))]


# --- dispatch


def dispatch_plan(experts, num_experts) -> list[Due]:
    return [Due(t) for t in reference.dispatch_plan(experts, num_experts)]


def permute(x, order, top_k) -> list[Due]:
    rows = x[order.clamp(min=0).long() // top_k]
    return [Due(torch.where((order >= 0).unsqueeze(-1), rows, 0.0))]


def unpermute(y, inverse, weights) -> list[Due]:
    kept = (inverse >= 0).unsqueeze(-1)
    rows = torch.where(kept, y[inverse.clamp(min=0).long()], 0.0)
    if weights is not None:
        rows = rows * torch.where(kept, weights.unsqueeze(-1), 0.0)
    return [Due(rows.sum(1), inverse.shape[1], 1, rows.square().sum(1).sqrt())]


def unpermute_bwd(grad, y, order, inverse, weights) -> list[Due]:
    k = inverse.shape[1]
    slot = order.clamp(min=0).long()
    grad_y = weights.flatten()[slot].unsqueeze(-1) * grad[slot // k]
    kept = (inverse >= 0).unsqueeze(-1)
    terms = grad.unsqueeze(1) * y[inverse.clamp(min=0).long()]
    terms = torch.where(kept, terms, 0.0)
    return [
        Due(torch.where((order >= 0).unsqueeze(-1), grad_y, 0.0), 1, 1),
        Due(terms.sum(-1), y.shape[1], 0, terms.square().sum(-1).sqrt()),
    ]


# --- products of the experts


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Rows of expert e of a times b[e]; zero past offsets[M]."""
    bounds = offsets.tolist()
    out = a.new_zeros(a.shape[0], b.shape[2])
    for (start, stop), matrix in zip(pairwise(bounds), b.unbind(0), strict=True):
        out[start:stop] = a[start:stop] @ matrix
    return out


def _grouped_product(a: Tensor, b: Tensor, offsets: Tensor) -> Due:
    magnitude = _grouped(a.square(), b.square(), offsets).sqrt()
    return Due(_grouped(a, b, offsets), a.shape[1], 1, magnitude)


def grouped_mm(a, b, offsets) -> list[Due]:
    return [_grouped_product(a, b.mT, offsets)]


def grouped_mm_bwd_a(grad, b, offsets) -> list[Due]:
    return [_grouped_product(grad, b, offsets)]


def _in_rows(t: Tensor, order: Tensor | None, top_k: int) -> Tensor:
    return t if top_k == 0 else t[order.clamp(min=0).long() // top_k]


def grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k, out_dtype) -> list[Due]:
    M = offsets[0].shape[0] - 1
    out = grad[0].new_zeros(M, grad[0].shape[1], input[0].shape[1])
    squares, rows = out.clone(), 0
    for s, bounds in enumerate(offsets):
        by_slot = order[s] if order else None
        g = _in_rows(grad[s], by_slot, grad_top_k)
        x = _in_rows(input[s], by_slot, input_top_k)
        rows += g.shape[0]
        for e, (start, stop) in enumerate(pairwise(bounds.tolist())):
            out[e] += g[start:stop].T @ x[start:stop]
            squares[e] += g[start:stop].square().T @ x[start:stop].square()
    return [Due(out, rows, 1, squares.sqrt())]


def grouped_wgrad_(sum, grad, input, order, offsets, grad_top_k, input_top_k) -> list[Due]:
    """The sum after the call."""
    (added,) = grouped_wgrad(grad, input, order, offsets, grad_top_k, input_top_k, None)
    magnitude = (added.magnitude.square() + sum.square()).sqrt()
    return [Due(sum + added.value, added.reduction + 1, 1, magnitude)]


class _Rows(NamedTuple):
    """A layer's slots in sorted order: token, weight, and which rows are of a slot."""

    token: Tensor
    weight: Tensor  # [N, 1]
    kept: Tensor  # [N, 1] bool


def _rows(weights: Tensor, order: Tensor) -> _Rows:
    slot = order.clamp(min=0).long()
    kept = (order >= 0).unsqueeze(-1)
    token = slot // weights.shape[1]
    return _Rows(token, weights.flatten()[slot].unsqueeze(-1), kept)


def _sum_rows(rows: Tensor, inverse: Tensor) -> Tensor:
    return unpermute(rows, inverse, None)[0].value


def expert_mlp(x, weights, gate_up, down, order, inverse, offsets, keep_preact) -> list[Due]:
    rows = _rows(weights, order)
    tokens = torch.where(rows.kept, x[rows.token], 0.0)
    preact = _grouped_product(tokens, gate_up.mT, offsets)
    gate, up = preact.value.chunk(2, -1)
    gate_size, up_size = preact.magnitude.chunk(2, -1)
    weight = torch.where(rows.kept, rows.weight, 0.0)
    # An error of the gate reaches silu(gate) by a slope below 1.1, and with a size of its own.
    hidden = weight * F.silu(gate) * up
    size = weight.square() * ((1.1 * gate_size * up).square() + (F.silu(gate) * up_size).square())
    y = _sum_rows(_grouped(hidden, down.mT, offsets), inverse)
    y_size = _sum_rows(_grouped(size, down.square().mT, offsets), inverse).sqrt()
    steps = x.shape[1] + down.shape[2] + weights.shape[1]
    kept = preact if keep_preact else Due(preact.value[:0])
    return [Due(y, steps, 7, y_size), kept]


def expert_mlp_bwd(grad, weights, gate_up, down, order, inverse, offsets, preact) -> list[Due]:
    """grad_x, grad_weights, grad_preact, hidden."""
    rows = _rows(weights, order)
    sent = torch.where(rows.kept, grad[rows.token], 0.0)
    weight = torch.where(rows.kept, rows.weight, 0.0)
    # Whatever the pre-activations past offsets[M] hold, no row is there.
    gate, up = torch.where(rows.kept, preact, 0.0).chunk(2, -1)
    act, slope = F.silu(gate), torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    back = _grouped_product(sent, down, offsets)
    factors = (weight * up * slope, weight * act)
    grad_preact = torch.cat([back.value * f for f in factors], -1)
    size = torch.cat([back.magnitude * f.abs() for f in factors], -1)
    to_x = _grouped(grad_preact, gate_up, offsets)
    x_size = _sum_rows(_grouped(size.square(), gate_up.square(), offsets), inverse).sqrt()
    slot_grad = (back.value * act * up).sum(-1, keepdim=True)
    slot_size = (back.magnitude * act * up).square().sum(-1, keepdim=True)
    steps, k = grad.shape[1] + 2 * down.shape[2], weights.shape[1]
    by_slot = {"inverse": inverse.reshape(-1, 1), "weights": None}
    (grad_w,), (w_size,) = unpermute(slot_grad, **by_slot), unpermute(slot_size, **by_slot)
    return [
        Due(_sum_rows(to_x, inverse), steps + k, 5, x_size),
        Due(grad_w.value.view(-1, k), steps, 4, w_size.value.sqrt().view(-1, k)),
        Due(grad_preact, grad.shape[1], 4, size),
        Due(weight * act * up, 0, 3),
    ]


def expert_mlp_bwd_(**arguments) -> list[Due]:
    """grad_x, grad_weights, hidden, and the pre-activations after the call."""
    grad_x, grad_weights, grad_preact, hidden = expert_mlp_bwd(**arguments)
    return [grad_x, grad_weights, hidden, grad_preact]
