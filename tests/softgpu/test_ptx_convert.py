# SPDX-License-Identifier: Apache-2.0
"""cvt between all types, with every rounding, saturation and relu, by exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import rounding
from ptx_kernels import (
    F32,
    F64,
    all_halves,
    evaluate,
    integers,
    needs_build,
    same_bits,
    some_halves,
)

pytestmark = needs_build

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


def register(t: str) -> np.dtype:
    """The type of a register that holds an integer type: no register has 8 bits."""
    return np.dtype(f"{'i' if t[0] == 's' else 'u'}{max(int(t[1:]) // 8, 2)}")


def bounds(t: str) -> tuple[int, int]:
    n = int(t[1:])
    return (-(1 << (n - 1)), (1 << (n - 1)) - 1) if t[0] == "s" else (0, (1 << n) - 1)


def value(x: int, t: str) -> int:
    n = int(t[1:])
    x &= (1 << n) - 1
    return x - (1 << n) if t[0] == "s" and x >> (n - 1) else x


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers(target, source):
    a = integers(source[0] + str(8 * register(source).itemsize))
    narrow = [value(x, source) for x in a.tolist()]
    d = register(target)
    want = np.array([value(x, target) for x in narrow], d)
    got = evaluate(f"cvt.{target}.{source} d, a;", a=a, d=d)
    same_bits(got, want)
    low, high = bounds(target)
    want = np.array([min(max(x, low), high) for x in narrow], d)
    same_bits(evaluate(f"cvt.sat.{target}.{source} d, a;", a=a, d=d), want)


INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def integral(x: float, mode: str, t: str) -> int:
    if math.isnan(x):
        return 0
    low, high = bounds(t)
    if math.isinf(x):
        return high if x > 0 else low
    return min(max(INTEGRAL[mode](Fraction(x)), low), high)


@pytest.mark.parametrize("mode", INTEGRAL)
@pytest.mark.parametrize("target", INTEGERS)
def test_floats_to_integers_clamp(target, mode):
    edges = [float(b) + e for b in bounds(target) for e in (-1, -0.5, 0, 0.5, 1)]
    for t, a in (("f32", np.array([*F32, *edges], np.float32)), ("f64", np.array([*F64, *edges]))):
        want = [integral(x, mode, target) for x in a.tolist()]
        got = evaluate(f"cvt.{mode}.{target}.{t} d, a;", a=a, d=register(target))
        assert got.tolist() == want, t


@pytest.mark.parametrize("mode", INTEGRAL)
def test_rounding_to_integral_floats(mode):
    f = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    same_bits(evaluate(f"cvt.{mode}.f32.f32 d, a;", a=F32, d=np.float32), f(F32))
    same_bits(evaluate(f"cvt.{mode}.f64.f64 d, a;", a=F64, d=np.float64), f(F64))
    a = all_halves()
    got = evaluate(f"cvt.{mode}.f16.f16 d, a;", a=a, d=np.uint16)
    with np.errstate(invalid="ignore"):
        same_bits(got.view(np.float16), f(a.view(np.float16)))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["u32", "s32", "u64", "s64"])
def test_integers_to_floats(source, mode):
    a = np.array([*integers(source).tolist(), 2**24 + 1, 2**24 + 3, 2**30 + 1], register(source))
    forms = (("f32", rounding.F32, np.float32), ("f64", rounding.F64, np.float64))
    for t, form, dtype in forms:
        want = [rounding.rounded(Fraction(x), form, mode) if x else 0.0 for x in a.tolist()]
        got = evaluate(f"cvt.{mode}.{t}.{source} d, a;", a=a, d=dtype)
        same_bits(got, np.array(want).astype(dtype), t)
    if mode == "rn":
        want = [rounding.rounded(Fraction(x), rounding.F16) if x else 0.0 for x in a.tolist()]
        got = evaluate(f"cvt.rn.f16.{source} d, a;", a=a, d=np.uint16)
        same_bits(got.view(np.float16), np.array(want).astype(np.float16))


def of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(a: np.ndarray, form: rounding.Format, mode: str) -> np.ndarray:
    """As float64."""
    return np.array(
        [
            rounding.rounded(Fraction(x), form, mode) if math.isfinite(x) and x else x
            for x in a.tolist()
        ]
    )


TIES = np.array(
    [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-25, 1.5 * 2**-24]
)
with np.errstate(invalid="ignore"):
    FLOATS = np.concatenate([F32, TIES, -TIES, some_halves().view(np.float16)])
    FLOATS = FLOATS.astype(np.float32)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_doubles_to_floats(mode):
    a = np.concatenate([F64, np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e-46, 3.4028236e38, 1e39])])
    want = narrowed(a, rounding.F32, mode)
    with np.errstate(over="ignore"):
        same_bits(evaluate(f"cvt.{mode}.f32.f64 d, a;", a=a, d=np.float32), want.astype(np.float32))
    same_bits(evaluate("cvt.f64.f32 d, a;", a=F32, d=np.float64), F32.astype(np.float64))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_floats_to_f16(mode):
    want = narrowed(FLOATS, rounding.F16, mode).astype(np.float16)
    got = evaluate(f"cvt.{mode}.f16.f32 d, a;", a=FLOATS, d=np.uint16)
    same_bits(got.view(np.float16), want)
    got = evaluate(f"cvt.{mode}.f16.f64 d, a;", a=FLOATS.astype(np.float64), d=np.uint16)
    same_bits(got.view(np.float16), want)


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_floats_to_bf16(mode):
    want = narrowed(FLOATS, rounding.BF16, mode).astype(np.float32)
    got = evaluate(f"cvt.{mode}.bf16.f32 d, a;", a=FLOATS, d=np.uint16)
    same_bits(of_bf16(got), want)


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_floats_to_tf32(mode):
    want = narrowed(FLOATS, rounding.TF32, mode).astype(np.float32)
    got = evaluate(f"cvt.{mode}.tf32.f32 d, a;", a=FLOATS, d=np.uint32)
    same_bits(got.view(np.float32), want)
    assert (got[~np.isnan(want)] & 0x1FFF == 0).all()


def test_halves_to_floats():
    a = all_halves()
    same_bits(
        evaluate("cvt.f32.f16 d, a;", a=a, d=np.float32), a.view(np.float16).astype(np.float32)
    )
    same_bits(
        evaluate("cvt.f64.f16 d, a;", a=a, d=np.float64), a.view(np.float16).astype(np.float64)
    )
    same_bits(evaluate("cvt.f32.bf16 d, a;", a=a, d=np.float32), of_bf16(a))


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_pairs_have_the_first_operand_on_top(t):
    a, b = FLOATS, np.roll(FLOATS, 3)
    one = evaluate(f"cvt.rn.{t}.f32 d, a;", a=a, d=np.uint16).astype(np.uint32)
    for relu in ("", ".relu"):
        got = evaluate(f"cvt.rn{relu}.{t}x2.f32 d, a, b;", a=a, b=b, d=np.uint32)
        negative = (np.signbit(a) & ~np.isnan(a)) if relu else np.zeros(len(a), bool)
        top = np.where(negative, 0, one)
        same_bits(got >> 16, top, relu)
        same_bits(got & 0xFFFF, np.roll(top, 3), relu)


def test_relu_and_saturation():
    half = evaluate("cvt.rn.relu.f16.f32 d, a;", a=FLOATS, d=np.uint16).view(np.float16)
    assert np.isnan(half[np.isnan(FLOATS)]).all()
    assert (half[~np.isnan(FLOATS)] >= 0).all()
    assert not np.signbit(half[FLOATS < 0]).any()
    got = evaluate("cvt.sat.f32.f32 d, a;", a=F32, d=np.float32)
    with np.errstate(invalid="ignore"):
        same_bits(got, np.where(F32 > 0, np.minimum(F32, 1), 0))
    half = evaluate("cvt.rn.sat.f16.f32 d, a;", a=F32, d=np.uint16).view(np.float16)
    assert ((half >= 0) & (half <= 1)).all()


def test_flush_to_zero():
    a = np.array([1e-45, -1e-40, 1.2e-38, 1], np.float32)
    got = evaluate("cvt.ftz.f32.f32 d, a;", a=a, d=np.float32)
    same_bits(got, np.array([0, -0.0, 1.2e-38, 1], np.float32))
    got = evaluate("cvt.rn.ftz.f16.f32 d, a;", a=a, d=np.uint16)
    assert got.tolist() == [0, 0x8000, 0, 0x3C00]
    assert evaluate("cvt.rpi.ftz.s32.f32 d, a;", a=a, d=np.int32).tolist() == [0, 0, 1, 1]


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa / 512
    return -size if code & 128 else size


E4M3 = np.array([e4m3(code) for code in range(256)])
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float64)


@pytest.mark.parametrize(("t", "table"), [("e4m3", E4M3), ("e5m2", E5M2)])
def test_eight_bits(t, table):
    codes = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    got = evaluate(f"cvt.rn.f16x2.{t}x2 d, a;", a=codes, d=np.uint32)
    for half, code in ((got >> 16, codes >> 8), (got & 0xFFFF, codes & 255)):
        same_bits(half.astype(np.uint16).view(np.float16), table[code].astype(np.float16))
    got = evaluate(f"cvt.rn.satfinite.{t}x2.f32 d, a, b;", a=FLOATS, b=-FLOATS, d=np.uint16)
    finite = np.sort(table[np.isfinite(table)])
    for x, code in zip(FLOATS.tolist(), got.tolist(), strict=True):
        y = table[code >> 8]
        if math.isnan(x):
            assert math.isnan(y)
            continue
        nearest = np.abs(finite - np.clip(x, finite[0], finite[-1])).min()
        assert abs(y - np.clip(x, finite[0], finite[-1])) == nearest
        same = table[code & 255]
        assert same == -y
