# SPDX-License-Identifier: Apache-2.0
"""The choice of experts from logits: norm_topk (UniPool's NormRouter) and softmax_topk."""

from typing import NamedTuple

import torch
from torch import Tensor

from unipool.ops.arguments import acc_dtype, check_devices, check_int, check_tensors
from unipool.ops.first_order import first_order

_ops = torch.ops.unipool


class Routing(NamedTuple):
    """The choice of one layer for T tokens, k experts per token, out of M."""

    weights: Tensor  # [T, k] float32 (float64 for float64 logits), differentiable
    experts: Tensor  # [T, k] int32; -1 in slots without an expert: silent, or masked
    load: Tensor  # [M] int32, (token, slot) pairs an expert got
    importance: Tensor  # [M] float32 (float64 likewise), sum of scores over tokens, differentiable


# --- fakes


def _fake_router(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    acc = acc_dtype(logits.dtype)
    return (
        logits.new_empty((tokens, top_k), dtype=acc),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((experts,), dtype=acc),
    )


@torch.library.register_fake("unipool::norm_topk")
def _(logits, scale, top_k, calibration, eps, bias, mask):
    check_devices("norm_topk", logits=logits, scale=scale, bias=bias, mask=mask)
    return _fake_router(logits, top_k)


@torch.library.register_fake("unipool::norm_topk_bwd")
def _(grad_weights, grad_importance, logits, scale, experts, calibration, eps, mask):
    grads = {"grad_weights": grad_weights, "grad_importance": grad_importance}
    check_devices("norm_topk_bwd", logits=logits, scale=scale, experts=experts, mask=mask, **grads)
    return logits.new_empty(logits.shape), scale.new_empty(scale.shape)


@torch.library.register_fake("unipool::softmax_topk")
def _(logits, top_k, renormalize, bias, mask):
    check_devices("softmax_topk", logits=logits, bias=bias, mask=mask)
    return _fake_router(logits, top_k)


@torch.library.register_fake("unipool::softmax_topk_bwd")
def _(grad_weights, grad_importance, logits, experts, renormalize, mask):
    grads = {"grad_weights": grad_weights, "grad_importance": grad_importance}
    check_devices("softmax_topk_bwd", logits=logits, experts=experts, mask=mask, **grads)
    return logits.new_empty(logits.shape)


# --- autograd


class NormTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, scale, bias, mask, top_k, calibration, eps):
        ctx.set_materialize_grads(False)
        weights, experts, load, importance = _ops.norm_topk(
            logits, scale, top_k, calibration, eps, bias, mask
        )
        ctx.save_for_backward(logits, scale, experts, mask)
        ctx.constants = (calibration, eps)
        ctx.mark_non_differentiable(experts, load)
        return weights, experts, load, importance

    @staticmethod
    @first_order
    def backward(ctx, grad_weights, _experts, _load, grad_importance):
        logits, scale, experts, mask = ctx.saved_tensors
        grads = (None, None)
        if grad_weights is not None or grad_importance is not None:
            grads = _ops.norm_topk_bwd(
                grad_weights, grad_importance, logits, scale, experts, *ctx.constants, mask
            )
        return *grads, None, None, None, None, None


class SoftmaxTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, mask, top_k, renormalize):
        ctx.set_materialize_grads(False)
        weights, experts, load, importance = _ops.softmax_topk(
            logits, top_k, renormalize, bias, mask
        )
        ctx.save_for_backward(logits, experts, mask)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(experts, load)
        return weights, experts, load, importance

    @staticmethod
    @first_order
    def backward(ctx, grad_weights, _experts, _load, grad_importance):
        logits, experts, mask = ctx.saved_tensors
        grad = None
        if grad_weights is not None or grad_importance is not None:
            grad = _ops.softmax_topk_bwd(
                grad_weights, grad_importance, logits, experts, ctx.renormalize, mask
            )
        return grad, None, None, None, None


# --- public


def _steering(op: str, logits: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The arguments that only steer the choice, checked; the bias in the dtype of the scores."""
    if mask is not None:
        check_tensors(op, mask=mask)
    if bias is None:
        return None
    check_tensors(op, bias=bias)
    if not bias.is_floating_point():
        raise TypeError(f"{op}: bias must be a floating point tensor, got {bias.dtype}")
    return bias.detach().to(acc_dtype(logits.dtype))


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
    """The k greatest of s = scale * calibration * relu(z / (|z|_2 + eps)), arXiv:2605.06665.

    Ties go to the lower expert id; NaN counts as greatest, so that it shows in the loss.

    Args:
        logits: [T, M] float32, bfloat16, float64 (CPU) or float16 (CUDA).
        scale: the learnable sigma, one element, float32 (float64 for float64 logits).
        top_k: experts per token, at most min(M, 16).
        calibration: the constant c.
        eps: guards a row of zeros.
        bias: [M], added to s for the choice only; gets no gradient.
        mask: [M] bool, True hides an expert: no part in the norm, never chosen. Where fewer than k
            experts are left, the spare slots have id -1 and weight 0.

    Returns:
        Routing; the weights are s itself, not renormalised. Slots whose score is 0 are silent: id
        -1, not dispatched, not counted in load. Gradients reach logits and scale from weights and
        importance.

    Raises:
        ValueError, TypeError: an argument's shape, range, device or dtype is not as above.
    """
    check_tensors("norm_topk", logits=logits, scale=scale)
    check_int("norm_topk", "top_k", top_k)
    bias = _steering("norm_topk", logits, bias, mask)
    return Routing(*NormTopk.apply(logits, scale, bias, mask, top_k, calibration, eps))


def softmax_topk(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """The k greatest of softmax(logits), the router of layer-private baselines.

    Ties go to the lower expert id; NaN counts as greatest, so that it shows in the loss.

    Args:
        logits: [T, M] float32, bfloat16, float64 (CPU) or float16 (CUDA).
        top_k: experts per token, at most min(M, 16).
        renormalize: divide the k weights by their sum. Refused for top_k = 1, where every weight
            would be 1 and the router would get no gradient from the task.
        bias: as for norm_topk.
        mask: as for norm_topk.

    Returns:
        Routing; importance sums the probabilities of all experts. Gradients reach logits from
        weights and importance.

    Raises:
        ValueError, TypeError: an argument's shape, range, device or dtype is not as above.
    """
    check_tensors("softmax_topk", logits=logits)
    check_int("softmax_topk", "top_k", top_k)
    bias = _steering("softmax_topk", logits, bias, mask)
    return Routing(*SoftmaxTopk.apply(logits, bias, mask, top_k, renormalize))
