# SPDX-License-Identifier: Apache-2.0
"""Rounding by exact fractions: what the tests hold the interpreter's floats against."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    mantissa: int
    exponent: int  # bits

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def greatest(self) -> Fraction:
        top = (1 << (self.exponent - 1)) - 1
        return Fraction(2) ** top * (2 - Fraction(1, 1 << self.mantissa))


F16, BF16, TF32 = Format(10, 5), Format(7, 8), Format(10, 8)
F32, F64 = Format(23, 8), Format(52, 11)


def log2_floor(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def rounded(x: Fraction, form: Format, mode: str = "rn") -> float:
    """A number that is not 0, as the nearest (rn, rna: ties from zero) or next one of a format."""
    size = abs(x)
    unit = Fraction(2) ** (max(log2_floor(size), form.least) - form.mantissa)
    n, rest = divmod(size, unit)
    up = {
        "rn": rest > unit / 2 or (rest == unit / 2 and n % 2),
        "rna": rest >= unit / 2,
        "rz": False,
        "rm": rest and x < 0,
        "rp": rest and x > 0,
    }[mode]
    size = (n + bool(up)) * unit
    if size > form.greatest:
        away = mode in ("rn", "rna") or (mode == "rm" and x < 0) or (mode == "rp" and x > 0)
        size = math.inf if away else form.greatest
    return -float(size) if x < 0 else float(size)


def zero_sum_downwards(function: Callable, values: tuple[float, ...]) -> float:
    """A sum that is exactly 0 is -0, unless it is of nothing but +0."""
    a, b, *c = values
    parts = {ADD: (a, b), SUB: (a, -b)}.get(function) or (a * b, *c)
    positive = all(part == 0 and math.copysign(1, part) > 0 for part in parts)
    return 0.0 if positive else -0.0


def exactly(
    function: Callable[..., Fraction],
    plain: Callable[..., np.ndarray],
    form: Format,
    mode: str,
    *arrays,
) -> np.ndarray:
    """The function of the arrays' elements, rounded once. `plain` is numpy's, which has the rules
    for infinities, NaNs and zeros."""
    with np.errstate(all="ignore"):
        result = np.array(plain(*(a.astype(np.float64) for a in arrays)), np.float64)
    for n, values in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
        if not all(map(math.isfinite, values)):
            continue
        try:
            exact = function(*map(Fraction, values))
        except ZeroDivisionError:
            continue
        if exact:
            result[n] = rounded(exact, form, mode)
        elif mode == "rm" and function in (ADD, SUB, FMA):
            result[n] = zero_sum_downwards(function, values)
    return result


def ADD(a, b):  # noqa: N802
    return a + b


def SUB(a, b):  # noqa: N802
    return a - b


def FMA(a, b, c):  # noqa: N802
    return a * b + c
