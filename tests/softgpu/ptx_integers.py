# SPDX-License-Identifier: Apache-2.0
"""Integers of a width, as PTX has them."""

import numpy as np

ALL = ("u16", "s16", "u32", "s32", "u64", "s64")

BITS = ("b16", "b32", "b64")


def wrap(value: int, dtype: np.dtype) -> int:
    bits = 8 * dtype.itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if dtype.kind == "i" and value >> (bits - 1) else value


def expect(function, dtype, *arrays) -> np.ndarray:
    dtype = np.dtype(dtype)
    rows = zip(*(a.tolist() for a in arrays), strict=True)
    return np.array([wrap(function(*row), dtype) for row in rows], dtype)
