# SPDX-License-Identifier: Apache-2.0
"""The gradient of each expert's matrix, summed over the rows of any number of layers.

No public function and no Function: grouped_wgrad is part of the backward of grouped_mm, expert_mlp
and a pool's pass (nn/pool_pass.py); grouped_wgrad_ adds to a sum in place.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from unipool.ops.arguments import check_devices


class WeightGradSegment(NamedTuple):
    """What one layer's backward leaves with a collector: the operands of both weight gradients."""

    grad: Tensor  # [T, D], of the layer's output
    x: Tensor  # [T, D], the layer's input
    grad_preact: Tensor  # [N, 2F], sorted rows
    hidden: Tensor  # [N, F], sorted rows, times the router weight
    order: Tensor  # [N] int32
    offsets: Tensor  # [M + 1] int32


class WeightGradCollector(Protocol):
    """Takes segments in place of returned weight gradients; unipool.nn.pool_pass has the one."""

    def add(self, segment: WeightGradSegment, top_k: int, needs: tuple[bool, bool]) -> None: ...


# --- fakes


def _check_segments(op: str, **lists: list[Tensor]) -> None:
    check_devices(op, **{f"{name}[{i}]": t for name, ts in lists.items() for i, t in enumerate(ts)})


@torch.library.register_fake("unipool::grouped_wgrad")
def _(grad, input, order, offsets, grad_top_k, input_top_k, out_dtype=None):
    _check_segments("grouped_wgrad", grad=grad, input=input, order=order, offsets=offsets)
    shape = (offsets[0].shape[0] - 1, grad[0].shape[1], input[0].shape[1])
    return grad[0].new_empty(shape, dtype=out_dtype or grad[0].dtype)


@torch.library.register_fake("unipool::grouped_wgrad_")
def _(sum, grad, input, order, offsets, grad_top_k, input_top_k):
    lists = {"grad": grad, "input": input, "order": order, "offsets": offsets}
    _check_segments("grouped_wgrad_", sum=[sum], **lists)
    return None
