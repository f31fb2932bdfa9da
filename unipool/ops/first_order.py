# SPDX-License-Identifier: Apache-2.0
"""Backward passes that have no derivative of their own, and say so on every route to one."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    """`count` gradients as they are, tied to what they were computed from.

    torch's once_differentiable ties them to leaves of its own: `.backward()` through them raises,
    but torch.autograd.grad, which prunes paths that do not reach its inputs, and so hvp and
    hessian, leave them out without a word (pytorch/pytorch#76185).
    """

    @staticmethod
    def forward(ctx, function, count, *tensors):
        ctx.function = function
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.function}: first derivatives only: its backward cannot be differentiated; "
            "unipool.reference has the same function with all derivatives"
        )


def first_order(backward: Callable) -> Callable:
    """Decorates the `backward` of an autograd.Function that computes with tensors outside of
    autograd; its results may be differentiated no further, and raise a RuntimeError if they are.

    They are tied to the gradients that came, to what was saved, and to `ctx.origins`. The backward
    finds in `ctx.create_graph` whether its results may be differentiated.
    """
    function = backward.__qualname__.split(".")[0]

    @functools.wraps(backward)
    def checked(ctx, *grads):
        ctx.create_graph = torch.is_grad_enabled()
        saved = ctx.saved_tensors if ctx.create_graph else ()  # before any of them is overwritten
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not ctx.create_graph:
            return results
        known = (*grads, *saved, *vars(ctx).pop("origins", ()))  # not kept: they may lead back here
        origins = [t for t in known if t is not None and t.requires_grad]
        several = isinstance(results, tuple)
        listed = list(results) if several else [results]
        found = [i for i, r in enumerate(listed) if isinstance(r, Tensor)]
        if not origins or not found:
            return results
        tied = _Refused.apply(function, len(found), *(listed[i] for i in found), *origins)
        for i, result in zip(found, tied, strict=True):
            listed[i] = result
        return tuple(listed) if several else listed[0]

    return checked
