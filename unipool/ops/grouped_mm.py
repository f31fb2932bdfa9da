# SPDX-License-Identifier: Apache-2.0
"""The product of each expert's rows with that expert's matrix."""

import torch
from torch import Tensor

from unipool.ops.arguments import autocast, check_devices, check_tensors
from unipool.ops.first_order import first_order

_ops = torch.ops.unipool


# --- fakes


@torch.library.register_fake("unipool::grouped_mm")
def _(a, b, offsets):
    check_devices("grouped_mm", a=a, b=b, offsets=offsets)
    return a.new_empty((a.shape[0], b.shape[1]))


@torch.library.register_fake("unipool::grouped_mm_bwd_a")
def _(grad, b, offsets):
    check_devices("grouped_mm_bwd_a", grad=grad, b=b, offsets=offsets)
    return grad.new_empty((grad.shape[0], b.shape[2]))


# --- autograd


class GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, offsets):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, offsets)
        return _ops.grouped_mm(a, b, offsets)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        a, b, offsets = ctx.saved_tensors
        grad_a = grad_b = None
        if grad is not None and ctx.needs_input_grad[0]:
            grad_a = _ops.grouped_mm_bwd_a(grad, b, offsets)
        if grad is not None and ctx.needs_input_grad[1]:
            grad_b = _ops.grouped_wgrad([grad], [a], [], [offsets], 0, 0)
        return grad_a, grad_b, None


# --- public


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies the rows of each expert by that expert's matrix, transposed.

    Args:
        a: [N, K] rows sorted by expert.
        b: [M, n, K], same dtype.
        offsets: [M + 1] int32, rows of expert e are offsets[e]:offsets[e + 1].

    Returns:
        [N, n] in the dtype of a, accumulated in float32 (float64 for float64); rows past
        offsets[M] are zero, and so is the gradient of an expert without rows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; offsets do not ascend (CPU).
    """
    check_tensors("grouped_mm", a=a, b=b, offsets=offsets)
    a, b = autocast(a, b)
    return GroupedMM.apply(a, b, offsets)
