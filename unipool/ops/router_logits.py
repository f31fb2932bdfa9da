# SPDX-License-Identifier: Apache-2.0
"""The product that routers score: x W^T with float32 sums, whatever the inputs' dtype."""

import torch
from torch import Tensor

from unipool.ops.arguments import acc_dtype, check_devices, check_tensors
from unipool.ops.first_order import first_order

_ops = torch.ops.unipool


# --- fakes


@torch.library.register_fake("unipool::router_logits")
def _(x, weight):
    check_devices("router_logits", x=x, weight=weight)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=acc_dtype(x.dtype))


@torch.library.register_fake("unipool::router_logits_bwd")
def _(grad, x, weight):
    check_devices("router_logits_bwd", grad=grad, x=x, weight=weight)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


# --- autograd


class RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _ops.router_logits(x, weight)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return _ops.router_logits_bwd(grad, *ctx.saved_tensors)


# --- public


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32, (1) of docs/math.md; low-precision inputs are not converted first.

    Products of bfloat16 or float16 numbers are exact in float32, and sums are float32, under
    autocast too. Where the products of bfloat16 inputs need not be converted, their backward takes
    the float32 gradient as the sum of two bfloat16 numbers, with a relative error of 2^-17.

    Args:
        x: [T, D] float32, bfloat16, float64 (CPU) or float16 (CUDA).
        weight: [M, D], in the dtype of x.

    Returns:
        Logits [T, M] float32 (float64 for float64 inputs). Gradients reach x and weight in their
        dtype.

    Raises:
        ValueError, TypeError: an argument's shape, device or dtype is not as above.
    """
    check_tensors("router_logits", x=x, weight=weight)
    return RouterLogits.apply(x, weight)
