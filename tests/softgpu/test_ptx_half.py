# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of f16, bf16 and their pairs: rounded once, by exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import rounding
from ptx_kernels import evaluate, needs_build, same_bits, some_halves

pytestmark = needs_build


def value(t: str, bits: np.ndarray) -> np.ndarray:
    if t == "f16":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


FORMS = {"f16": rounding.F16, "bf16": rounding.BF16}
OPERATIONS = {
    "add": (rounding.ADD, np.add, 2),
    "sub": (rounding.SUB, np.subtract, 2),
    "mul": (lambda a, b: a * b, np.multiply, 2),
    "fma": (rounding.FMA, lambda a, b, c: a * b + c, 3),
}


def operands(n: int) -> list[np.ndarray]:
    return [
        some_halves(seed) if seed == 0 else np.roll(some_halves(seed), seed) for seed in range(n)
    ]


@pytest.mark.parametrize("t", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_rounded_once(name, t):
    exact, plain, n = OPERATIONS[name]
    arrays = dict(zip("abc", operands(n), strict=False))
    # Products that a third operand only tips: what rounding twice gets wrong.
    if name == "fma":
        arrays["c"][2000:] = some_halves(9)[2000:] & 0x8FFF
    want = rounding.exactly(exact, plain, FORMS[t], "rn", *(value(t, a) for a in arrays.values()))
    code = f"{name}.rn.{t} d, {', '.join(arrays)};"
    got = value(t, evaluate(code, **arrays, d=np.uint16))
    same_bits(got, want)
    # A pair is two of them.
    pairs = {
        k: a.astype(np.uint32) | np.roll(a, 1).astype(np.uint32) << 16 for k, a in arrays.items()
    }
    both = evaluate(code.replace(t, t + "x2"), **pairs, d=np.uint32)
    same_bits(value(t, (both & 0xFFFF).astype(np.uint16)), want)
    same_bits(value(t, (both >> 16).astype(np.uint16)), np.roll(want, 1))


def test_a_product_between_two_numbers_is_tipped_by_a_tiny_addend():
    # 1.0078125 * 1.0078125 = 1.01568603515625: between two bf16; and exact ties with an addend that
    # a sum in float64 loses.
    a = np.array([0x3F81, 0x3FC0, 0x3FC0], np.uint16)  # 1.0078125, 1.5, 1.5
    b = np.array([0x3F81, 0x3F81, 0x3F81], np.uint16)  # 1.5 * 1.0078125 = 1.51171875: a tie
    c = np.array([0, 0x0001, 0x8001], np.uint16)  # +-2^-133
    got = value("bf16", evaluate("fma.rn.bf16 d, a, b, c;", a=a, b=b, c=c, d=np.uint16))
    assert got.tolist() == [1.015625, 1.515625, 1.5078125]


@pytest.mark.parametrize("t", FORMS)
def test_modifiers(t):
    a, b = operands(2)
    x, y = value(t, a), value(t, b)
    total = rounding.exactly(rounding.ADD, np.add, FORMS[t], "rn", x, y)
    product = rounding.exactly(lambda p, q: p * q, np.multiply, FORMS[t], "rn", x, y)
    if t == "f16":
        with np.errstate(invalid="ignore"):
            for name, exact in (("add", total), ("mul", product)):
                got = value(t, evaluate(f"{name}.sat.f16 d, a, b;", a=a, b=b, d=np.uint16))
                same_bits(got, np.where(exact > 0, np.minimum(exact, 1), 0))
        flush = np.abs(total) < 2.0**-14
        got = value(t, evaluate("add.rn.ftz.f16 d, a, b;", a=a, b=b, d=np.uint16))
        assert (got[flush] == 0).all()
    zero = np.zeros_like(a)
    got = value(t, evaluate(f"fma.rn.relu.{t} d, a, b, z;", a=a, b=b, z=zero, d=np.uint16))
    want = np.where(product < 0, 0, product)
    ok = ~np.isnan(product) & (product != 0)
    same_bits(got[ok], want[ok])


@pytest.mark.parametrize("t", FORMS)
@pytest.mark.parametrize("name", ["max", "min"])
def test_max_and_min(name, t):
    a, b = operands(2)
    x, y = value(t, a), value(t, b)
    want = (np.fmax if name == "max" else np.fmin)(x, y)
    opposite = (x == 0) & (y == 0) & (np.signbit(x) != np.signbit(y))
    want[opposite] = 0.0 if name == "max" else -0.0
    same_bits(value(t, evaluate(f"{name}.{t} d, a, b;", a=a, b=b, d=np.uint16)), want)
    want[np.isnan(x) | np.isnan(y)] = np.nan
    same_bits(value(t, evaluate(f"{name}.NaN.{t} d, a, b;", a=a, b=b, d=np.uint16)), want)
    got = value(t, evaluate(f"{name}.xorsign.abs.{t} d, a, b;", a=a, b=b, d=np.uint16))
    size = (np.fmax if name == "max" else np.fmin)(np.abs(x), np.abs(y))
    want = np.where(np.signbit(x) != np.signbit(y), -size, size)
    ok = ~np.isnan(size)
    same_bits(got[ok], want[ok])


@pytest.mark.parametrize("t", FORMS)
def test_signs(t):
    a = some_halves()
    assert (evaluate(f"neg.{t} d, a;", a=a, d=np.uint16) == a ^ 0x8000).all()
    assert (evaluate(f"abs.{t} d, a;", a=a, d=np.uint16) == a & 0x7FFF).all()
    pair = a.astype(np.uint32) << 16 | a[::-1]
    assert (evaluate(f"neg.{t}x2 d, a;", a=pair, d=np.uint32) == pair ^ 0x80008000).all()
    assert (evaluate(f"abs.{t}x2 d, a;", a=pair, d=np.uint32) == pair & 0x7FFF7FFF).all()


SPECIAL = ["ex2.approx.f16", "ex2.approx.ftz.bf16", "tanh.approx.f16", "tanh.approx.bf16"]


@pytest.mark.parametrize("name", SPECIAL)
def test_special_functions(name):
    t = name.rsplit(".", 1)[1]
    a = some_halves()
    x = value(t, a)
    with np.errstate(all="ignore"):
        exact = np.exp2(x) if name.startswith("ex2") else np.tanh(x)
    got = value(t, evaluate(f"{name} d, a;", a=a, d=np.uint16))
    for e, g in zip(exact.tolist(), got.tolist(), strict=True):
        if math.isfinite(e) and e:
            assert g == rounding.rounded(Fraction(e), FORMS[t])
        else:
            assert g == e or (math.isnan(g) and math.isnan(e))


@pytest.mark.parametrize("t", FORMS)
def test_comparisons(t):
    a, b = operands(2)
    b[::5] = a[::5]
    x, y = value(t, a), value(t, b)
    assert (evaluate(f"setp.lt.{t} p, a, b;", a=a, b=b, p=bool) == (x < y)).all()
    assert (evaluate(f"setp.eq.{t} p, a, b;", a=a, b=b, p=bool) == (x == y)).all()
    assert (evaluate(f"setp.geu.{t} p, a, b;", a=a, b=b, p=bool) == ~(x < y)).all()
    one = 0x3C00 if t == "f16" else 0x3F80
    got = evaluate(f"set.le.{t}.{t} d, a, b;", a=a, b=b, d=np.uint16)
    assert (got == np.where(x <= y, one, 0)).all()
    # The predicates of a pair are of its lower and its upper half.
    pair = {"a": a.astype(np.uint32) | a[::-1].astype(np.uint32) << 16}
    pair["b"] = b.astype(np.uint32) | b[::-1].astype(np.uint32) << 16
    p, q = evaluate(f"setp.gt.{t}x2 p|q, a, b;", **pair, p=bool, q=bool)
    assert (p == (x > y)).all()
    assert (q == (x > y)[::-1]).all()
    got = evaluate(f"set.gt.{t}x2.{t}x2 d, a, b;", **pair, d=np.uint32)
    assert (got & 0xFFFF == np.where(x > y, one, 0)).all()
    got = evaluate(f"set.gt.u32.{t}x2 d, a, b;", **pair, d=np.uint32)
    assert (got >> 16 == np.where((x > y)[::-1], 0xFFFF, 0)).all()
