# SPDX-License-Identifier: Apache-2.0
"""What the suites of the grouped products share."""

import torch
from tolerance import Tolerance, check_close
from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]


def names(values: list[tuple[torch.dtype, str]]) -> list[str]:
    """Ids of pairs of a dtype and a tile."""
    return [f"{str(dtype).removeprefix('torch.')}-{tile}" for dtype, tile in values]


def check_product(actual: Tensor, expected: Tensor, reduction: int, dtype: torch.dtype) -> None:
    """Sums of `reduction` products in float32, rounded once to `dtype`."""
    check_close(actual, expected, Tolerance(reduction, roundings=1), dtype)
