# SPDX-License-Identifier: Apache-2.0
"""Token permutation: dispatch_plan, permute, unpermute."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unipool.ops.arguments import check_devices, check_int, check_tensors
from unipool.ops.first_order import first_order

_ops = torch.ops.unipool


class DispatchPlan(NamedTuple):
    """Where the N = T * k slots go when they are sorted by expert; a slot is token * k + j.

    Shapes never depend on the routing. Slots with an id outside [0, M) are dropped.
    """

    order: Tensor  # [N] int32, slot of each sorted row (stable), -1 past offsets[M]
    inverse: Tensor  # [T, k] int32, sorted row of each slot, -1 for a dropped slot
    offsets: Tensor  # [M + 1] int32, rows of expert e are offsets[e]:offsets[e + 1]


# --- fakes


@torch.library.register_fake("unipool::dispatch_plan")
def _(experts, num_experts):
    check_devices("dispatch_plan", **{f"experts[{i}]": t for i, t in enumerate(experts)})
    tokens = sum(layer.shape[0] for layer in experts)
    top_k = experts[0].shape[1]
    like = experts[0]
    return (
        like.new_empty((tokens * top_k,)),
        like.new_empty((tokens, top_k)),
        like.new_empty((num_experts + 1,)),
    )


@torch.library.register_fake("unipool::permute")
def _(x, order, top_k):
    check_devices("permute", x=x, order=order)
    return x.new_empty((order.shape[0], x.shape[1]))


@torch.library.register_fake("unipool::unpermute")
def _(y, inverse, weights):
    check_devices("unpermute", y=y, inverse=inverse, weights=weights)
    return y.new_empty((inverse.shape[0], y.shape[1]))


@torch.library.register_fake("unipool::unpermute_bwd")
def _(grad, y, order, inverse, weights):
    check_devices("unpermute_bwd", y=y, grad=grad, order=order, inverse=inverse, weights=weights)
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


# --- autograd: permute and unpermute without weights are each other's backward


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        return _ops.permute(x, order, inverse.shape[1])

    @staticmethod
    @first_order
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return (None if grad is None else _ops.unpermute(grad, inverse, None)), None, None


class Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order, inverse):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(order)
        ctx.top_k = inverse.shape[1]
        return _ops.unpermute(y, inverse, None)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return (None if grad is None else _ops.permute(grad, order, ctx.top_k)), None, None


class WeightedUnpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, order, inverse):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, weights, order, inverse)
        return _ops.unpermute(y, inverse, weights)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        y, weights, order, inverse = ctx.saved_tensors
        grads = (None, None)
        if grad is not None:
            grads = _ops.unpermute_bwd(grad, y, order, inverse, weights)
        return *grads, None, None


# --- public


def _check_plan(op: str, plan: DispatchPlan) -> None:
    if not isinstance(plan, tuple) or len(plan) != 3:
        raise TypeError(f"{op}: plan must be a DispatchPlan, got {type(plan).__name__}")
    named = {f"plan.{name}": t for name, t in zip(DispatchPlan._fields, plan, strict=True)}
    check_tensors(op, **named)
    order, inverse, _ = plan
    if inverse.dim() != 2:
        raise ValueError(f"{op}: plan.inverse must be [T, k], got {list(inverse.shape)}")
    if order.shape != (inverse.numel(),):
        raise ValueError(
            f"{op}: plan.order must be [T * k] = [{inverse.numel()}], got {list(order.shape)}"
        )
    check_devices(op, **named)
    for name, index in (("order", order), ("inverse", inverse)):
        if index.dtype != torch.int32:
            raise TypeError(f"{op}: plan.{name} must be int32, got {index.dtype}")


def dispatch_plan(experts: Tensor | Sequence[Tensor], num_experts: int) -> DispatchPlan:
    """Sorts slots by expert, stably, with a counting sort that waits for nothing on the host.

    Args:
        experts: [T, k] int32 ids, or a list with one [T_l, k] a layer: slots then run through all
            layers in list order (the cross-layer permutation). Ids outside [0, M) are dropped.
        num_experts: M.

    Returns:
        DispatchPlan of the N = sum T_l * k slots, on the device of experts.

    Raises:
        ValueError, TypeError: no layer, layers of different k or device, ids that are not int32.
    """
    layers = [experts] if isinstance(experts, Tensor) else experts
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"dispatch_plan: experts must be a Tensor or a list, got {type(experts).__name__}"
        )
    check_tensors("dispatch_plan", **{f"experts[{i}]": t for i, t in enumerate(layers)})
    check_int("dispatch_plan", "num_experts", num_experts)
    if len(layers) == 0:
        raise ValueError("dispatch_plan: experts must have at least one layer, got an empty list")
    return DispatchPlan(*_ops.dispatch_plan(layers, num_experts))


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token's row to its sorted places.

    Args:
        x: [T, D] floating point.
        plan: of T tokens.

    Returns:
        [N, D]; rows past offsets[M] are zero. The gradient sums a token's rows in slot order with
        float32 accumulation.

    Raises:
        ValueError, TypeError: x and plan do not fit, or the plan's ids are out of range (CPU).
    """
    check_tensors("permute", x=x)
    _check_plan("permute", plan)
    return Permute.apply(x, plan.order, plan.inverse)


def unpermute(y: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Sums each token's sorted rows, in slot order with float32 accumulation (deterministic).

    Args:
        y: [N, D] floating point, in sorted order.
        plan: of T tokens.
        weights: [T, k] float32 (float64 for float64 y), or None for a plain sum.

    Returns:
        [T, D]; a dropped slot adds nothing.

    Raises:
        ValueError, TypeError: the arguments do not fit, or the plan's ids are out of range (CPU).
    """
    check_tensors("unpermute", y=y)
    _check_plan("unpermute", plan)
    if weights is None:
        return Unpermute.apply(y, plan.order, plan.inverse)
    check_tensors("unpermute", weights=weights)
    return WeightedUnpermute.apply(y, weights, plan.order, plan.inverse)
