# SPDX-License-Identifier: Apache-2.0
"""f32 and f64: directions of rounding by exact fractions, .ftz, .sat, NaN, infinities, zeros."""

import numpy as np
import pytest
import rounding
from ptx_kernels import F32, F64, evaluate, needs_build, product, same_bits

pytestmark = needs_build

FORMATS = {"f32": (rounding.F32, np.float32, F32), "f64": (rounding.F64, np.float64, F64)}
MODES = ("rn", "rz", "rm", "rp")


BINARY = {
    "add": (rounding.ADD, np.add),
    "sub": (rounding.SUB, np.subtract),
    "mul": (lambda a, b: a * b, np.multiply),
    "div": (lambda a, b: a / b, np.divide),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", FORMATS)
@pytest.mark.parametrize("name", BINARY)
def test_rounded_once(name, t, mode):
    form, dtype, values = FORMATS[t]
    a, b = product(values[::2], values[1:])
    exact, plain = BINARY[name]
    want = rounding.exactly(exact, plain, form, mode, a, b).astype(dtype)
    same_bits(evaluate(f"{name}.{mode}.{t} d, a, b;", a=a, b=b, d=dtype), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", FORMATS)
def test_fma_is_rounded_once(t, mode):
    form, dtype, values = FORMATS[t]
    a, b, c = product(values[::3], values[1::3], values[::5])
    want = rounding.exactly(rounding.FMA, lambda x, y, z: x * y + z, form, mode, a, b, c)
    # Where the parts are finite, numpy's own product may overflow: only special values are its.
    got = evaluate(f"fma.{mode}.{t} d, a, b, c;", a=a, b=b, c=c, d=dtype)
    same_bits(got, want.astype(dtype))
    same_bits(evaluate(f"mad.{mode}.{t} d, a, b, c;", a=a, b=b, c=c, d=dtype), want.astype(dtype))


@pytest.mark.parametrize("t", FORMATS)
def test_without_a_mode_is_to_nearest(t):
    _, dtype, values = FORMATS[t]
    a, b = product(values, values)
    with np.errstate(all="ignore"):
        for name, want in (("add", a + b), ("sub", a - b), ("mul", a * b)):
            same_bits(evaluate(f"{name}.{t} d, a, b;", a=a, b=b, d=dtype), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", FORMATS)
def test_reciprocal_and_root(t, mode):
    form, dtype, values = FORMATS[t]
    want = rounding.exactly(lambda x: 1 / x, lambda x: 1 / x, form, mode, values).astype(dtype)
    same_bits(evaluate(f"rcp.{mode}.{t} d, a;", a=values, d=dtype), want)
    got = evaluate(f"sqrt.{mode}.{t} d, a;", a=values, d=dtype)
    with np.errstate(all="ignore"):
        nearest = np.sqrt(values)
        if mode == "rn":
            same_bits(got, nearest)
        # The next number in the direction that is not past the root.
        for x, r in zip(values.tolist(), got.tolist(), strict=True):
            if not 0 < x < np.inf:
                continue
            square = rounding.Fraction(r) ** 2
            toward = np.nextafter(dtype(r), dtype(np.inf if mode != "rp" else 0)).item()
            if mode in ("rz", "rm"):
                assert square <= x < rounding.Fraction(toward) ** 2
            if mode == "rp":
                assert rounding.Fraction(toward) ** 2 < x <= square


def flushed(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < np.float32(1.17549435e-38), np.copysign(np.float32(0), a), a)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn", "max", "min"])
def test_flush_to_zero(name):
    tiny = np.array([1e-45, -1e-40, 1.17549435e-38, -1.2e-38, 0, -0.0, 1, -2, np.inf], np.float32)
    a, b = product(tiny, tiny)
    x, y = flushed(a), flushed(b)
    with np.errstate(all="ignore"):
        want = {
            "add": x + y,
            "sub": x - y,
            "mul": x * y,
            "div.rn": x / y,
            "max": np.where(x == y, np.where(np.signbit(x), y, x), np.maximum(x, y)),
            "min": np.where(x == y, np.where(np.signbit(x), x, y), np.minimum(x, y)),
        }[name]
    got = evaluate(f"{name}.ftz.f32 d, a, b;", a=a, b=b, d=np.float32)
    same_bits(got, flushed(want.astype(np.float32)))
    keeps = evaluate("add.f32 d, a, b;", a=a, b=np.zeros_like(a), d=np.float32)
    assert (keeps[a == np.float32(1e-45)] != 0).all()


def test_saturation():
    a, b = product(F32, F32)
    with np.errstate(all="ignore"):
        for name, exact in (("add", a + b), ("sub", a - b), ("mul", a * b)):
            want = np.where(np.isnan(exact) | (exact <= 0), 0, np.minimum(exact, 1))
            same_bits(evaluate(f"{name}.sat.f32 d, a, b;", a=a, b=b, d=np.float32), want)
        want = np.where(np.isnan(a * a + b) | ~(a * a + b > 0), 0, 1)
    got = evaluate("fma.rn.sat.f32 d, a, a, b;", a=a, b=b, d=np.float32)
    assert ((got >= 0) & (got <= 1)).all()
    assert (got[want == 0] == 0).all()


@pytest.mark.parametrize("t", FORMATS)
def test_max_and_min(t):
    _, dtype, values = FORMATS[t]
    a, b = product(values, values)
    for name, f, zero in (("max", np.fmax, 0.0), ("min", np.fmin, -0.0)):
        want = f(a, b)
        want[(a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b))] = zero
        same_bits(evaluate(f"{name}.{t} d, a, b;", a=a, b=b, d=dtype), want)
        if t == "f32":
            want[np.isnan(a) | np.isnan(b)] = np.nan
            same_bits(evaluate(f"{name}.NaN.f32 d, a, b;", a=a, b=b, d=dtype), want)


@pytest.mark.parametrize("t", FORMATS)
def test_signs(t):
    _, dtype, values = FORMATS[t]
    same_bits(evaluate(f"neg.{t} d, a;", a=values, d=dtype), -values)
    same_bits(evaluate(f"abs.{t} d, a;", a=values, d=dtype), np.abs(values))
    a, b = product(values, values)
    got = evaluate(f"copysign.{t} d, a, b;", a=a, b=b, d=dtype)  # the sign of a
    same_bits(got, np.copysign(b, a))


SPECIAL = {
    "rcp.approx": lambda x: 1 / x,
    "sqrt.approx": np.sqrt,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "sin.approx": np.sin,
    "cos.approx": np.cos,
    "tanh.approx": np.tanh,
}


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_functions(name, ftz):
    if ftz and name.startswith("tanh"):
        ftz = ""  # tanh has no .ftz
    a = np.concatenate([F32, np.linspace(-20, 20, 401, dtype=np.float32)])
    x = flushed(a) if ftz else a
    with np.errstate(all="ignore"):
        want = SPECIAL[name](x.astype(np.float64)).astype(np.float32)
    got = evaluate(f"{name}{ftz}.f32 d, a;", a=a, d=np.float32)
    want = flushed(want) if ftz else want
    special = ~np.isfinite(want) | (want == 0)
    same_bits(got[special], want[special])
    bound = np.spacing(np.abs(want[~special])) * 2
    assert (np.abs(got[~special] - want[~special]) <= bound).all()


def test_approximate_divisions():
    a, b = product(F32, F32)
    with np.errstate(all="ignore"):
        exact = a / b
    large = (np.abs(b) > 2.0**126) & np.isfinite(b)
    for name in ("div.approx.f32", "div.full.f32"):
        got = evaluate(f"{name} d, a, b;", a=a, b=b, d=np.float32)
        same_bits(got[~large], exact[~large], name)
    got = evaluate("div.approx.f32 d, a, b;", a=a, b=b, d=np.float32)
    finite = large & np.isfinite(a)
    assert (got[finite] == 0).all()
    assert np.isnan(got[large & np.isinf(a)]).all()


@pytest.mark.parametrize("name", ["rcp", "rsqrt"])
def test_doubles_of_which_only_the_upper_half_is_written(name):
    a = np.array([1, 3, 10, 0.1, 1e300, np.inf, 0.0], np.float64)
    with np.errstate(all="ignore"):
        want = 1 / (a if name == "rcp" else np.sqrt(a))
    got = evaluate(f"{name}.approx.ftz.f64 d, a;", a=a, d=np.float64)
    assert (got.view(np.uint64) & 0xFFFFFFFF == 0).all()
    same_bits(got, (want.view(np.uint64) & ~np.uint64(0xFFFFFFFF)).view(np.float64))


def test_rsqrt_of_doubles():
    a = np.array([1, 3, 4, 1e-300], np.float64)
    got = evaluate("rsqrt.approx.f64 d, a;", a=a, d=np.float64)
    assert np.allclose(got, 1 / np.sqrt(a), rtol=1e-15)


@pytest.mark.parametrize("t", FORMATS)
def test_kinds_of_numbers(t):
    _, dtype, a = FORMATS[t]
    small = np.finfo(dtype).smallest_normal
    subnormal = (np.abs(a) < small) & (a != 0)
    kinds = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & (np.abs(a) >= small),
        "subnormal": subnormal,
    }
    for kind, want in kinds.items():
        assert (evaluate(f"testp.{kind}.{t} p, a;", a=a, p=bool) == want).all(), kind


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {c + "u": f for c, f in ORDERED.items()}


def compared(c: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    nan = np.isnan(a) | np.isnan(b)
    if c in ("num", "nan"):
        return nan if c == "nan" else ~nan
    sign = {**ORDERED, **UNORDERED}[c]
    plain = {
        "==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b,
    }[sign]  # fmt: skip
    return np.where(nan, c in UNORDERED, plain)


@pytest.mark.parametrize("t", FORMATS)
@pytest.mark.parametrize("c", [*ORDERED, *UNORDERED, "num", "nan"])
def test_comparisons(c, t):
    _, _, values = FORMATS[t]
    a, b = product(values, values)
    want = compared(c, a, b)
    p, q = evaluate(f"setp.{c}.{t} p|q, a, b;", a=a, b=b, p=bool, q=bool)
    assert (p == want).all()
    assert (q == ~want).all()
    d = evaluate(f"set.{c}.u32.{t} d, a, b;", a=a, b=b, d=np.uint32)
    assert (d == np.where(want, 0xFFFFFFFF, 0)).all()
    d = evaluate(f"set.{c}.f32.{t} d, a, b;", a=a, b=b, d=np.float32)
    assert (d == want).all()


def test_comparisons_flush():
    a = np.array([1e-45, 0, -1e-45, 1], np.float32)
    p = evaluate("setp.eq.ftz.f32 p, a, 0f00000000;", a=a, p=bool)
    assert p.tolist() == [True, True, True, False]


@pytest.mark.parametrize("t", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_comparisons(t):
    from ptx_kernels import integers

    a, b = product(integers(t), integers(t))
    names = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if t[0] == "u":
        names |= {"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}
    for c, want in names.items():
        assert (evaluate(f"setp.{c}.{t} p, a, b;", a=a, b=b, p=bool) == want).all(), c


def test_comparisons_with_a_predicate():
    a, b = product(F32[:8], F32[:8])
    c = np.arange(len(a)) % 3 == 0
    less = a < b
    for logic, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        p, q = evaluate(f"setp.lt.{logic}.f32 p|q, a, b, c;", a=a, b=b, c=c, p=bool, q=bool)
        assert (p == f(less, c)).all(), logic
        assert (q == f(~less, c)).all(), logic
        p = evaluate(f"setp.lt.{logic}.f32 p, a, b, !c;", a=a, b=b, c=c, p=bool)
        assert (p == f(less, ~c)).all(), logic
        d = evaluate(f"set.lt.{logic}.u32.f32 d, a, b, c;", a=a, b=b, c=c, d=np.uint32)
        assert ((d != 0) == f(less, c)).all(), logic


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selections(bits):
    dtype = np.dtype(f"u{bits // 8}")
    a = np.arange(64).astype(dtype)
    b = (a + 100).astype(dtype)
    p = np.arange(64) % 3 == 0
    got = evaluate(f"selp.b{bits} d, a, b, p;", a=a, b=b, p=p, d=dtype)
    same_bits(got, np.where(p, a, b))
    got = evaluate(f"selp.b{bits} d, a, 7, !p;", a=a, p=p, d=dtype)
    same_bits(got, np.where(p, 7, a))
    c = np.resize(np.array([0, 1, -1, 2**31 - 1, -(2**31)], np.int32), 64)
    got = evaluate(f"slct.b{bits}.s32 d, a, b, c;", a=a, b=b, c=c, d=dtype)
    same_bits(got, np.where(c >= 0, a, b))
    x = np.resize(np.array([0, -0.0, 1, -1e-45, -1, np.nan, np.inf], np.float32), 64)
    got = evaluate(f"slct.b{bits}.f32 d, a, b, x;", a=a, b=b, x=x, d=dtype)
    same_bits(got, np.where(x >= 0, a, b))
