# SPDX-License-Identifier: Apache-2.0
"""PTX: integer arithmetic against Python."""

import numpy as np
import pytest
from ptx_integers import ALL, BITS, expect
from ptx_kernels import evaluate, integers, needs_build, product, same_bits, unsigned

from softgpu.ptx import PtxError

pytestmark = needs_build


def divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": (ALL, lambda a, b, n: a + b),
    "sub": (ALL, lambda a, b, n: a - b),
    "mul.lo": (ALL, lambda a, b, n: a * b),
    "mul.hi": (ALL, lambda a, b, n: a * b >> n),
    "max": (ALL, lambda a, b, n: max(a, b)),
    "min": (ALL, lambda a, b, n: min(a, b)),
    "div": (ALL, lambda a, b, n: divide(a, b)),
    "rem": (ALL, lambda a, b, n: a - b * divide(a, b)),
    "and": (BITS, lambda a, b, n: a & b),
    "or": (BITS, lambda a, b, n: a | b),
    "xor": (BITS, lambda a, b, n: a ^ b),
    "max.relu": (("s32",), lambda a, b, n: max(a, b, 0)),
    "min.relu": (("s32",), lambda a, b, n: max(min(a, b), 0)),
    "add.sat": (("s32",), lambda a, b, n: min(max(a + b, -(2**31)), 2**31 - 1)),
    "sub.sat": (("s32",), lambda a, b, n: min(max(a - b, -(2**31)), 2**31 - 1)),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    types, function = BINARY[name]
    for t in types:
        a, b = product(integers(t), integers(t))
        if name in ("div", "rem"):
            a, b = a[b != 0], b[b != 0]
        got = evaluate(f"{name}.{t} d, a, b;", a=a, b=b, d=a.dtype)
        n = int(t[1:])
        same_bits(got, expect(lambda x, y, n=n: function(x, y, n), a.dtype, a, b), f"{name}.{t}")


@pytest.mark.parametrize("name", ["div", "rem"])
def test_division_by_zero_is_reported(name):
    one = np.ones(4, np.int32)
    with pytest.raises(PtxError, match="division by zero"):
        evaluate(f"{name}.s32 d, a, b;", a=one, b=one - 1, d=np.int32)


@pytest.mark.parametrize("t", ["u16", "s16", "u32", "s32"])
def test_wide_products(t):
    a, b = product(integers(t), integers(t))
    wide = np.dtype(a.dtype.kind + str(2 * a.itemsize))
    got = evaluate(f"mul.wide.{t} d, a, b;", a=a, b=b, d=wide)
    same_bits(got, expect(lambda x, y: x * y, wide, a, b))
    c = np.resize(integers(t[0] + str(8 * wide.itemsize)), len(a)).astype(wide)
    got = evaluate(f"mad.wide.{t} d, a, b, c;", a=a, b=b, c=c, d=wide)
    same_bits(got, expect(lambda x, y, z: x * y + z, wide, a, b, c))
    # An immediate addend has the width of the result.
    got = evaluate(f"mad.wide.{t} d, a, b, -5;", a=a, b=b, d=wide)
    same_bits(got, expect(lambda x, y: x * y - 5, wide, a, b))


@pytest.mark.parametrize("t", ALL)
def test_multiply_add(t):
    a, b = product(integers(t), integers(t))
    c = np.roll(a, 5)
    n = int(t[1:])
    got = evaluate(f"mad.lo.{t} d, a, b, c;", a=a, b=b, c=c, d=a.dtype)
    same_bits(got, expect(lambda x, y, z: x * y + z, a.dtype, a, b, c))
    got = evaluate(f"mad.hi.{t} d, a, b, c;", a=a, b=b, c=c, d=a.dtype)
    same_bits(got, expect(lambda x, y, z: (x * y >> n) + z, a.dtype, a, b, c))
    want = expect(lambda x, y, z: z + abs(x - y), a.dtype, a, b, c)
    same_bits(evaluate(f"sad.{t} d, a, b, c;", a=a, b=b, c=c, d=a.dtype), want)


def test_multiply_add_high_saturates():
    a, b = product(integers("s32"), integers("s32"))
    c = np.where(a < 0, -(2**31), 2**31 - 1).astype(np.int32)
    want = expect(
        lambda x, y, z: min(max((x * y >> 32) + z, -(2**31)), 2**31 - 1), np.int32, a, b, c
    )
    same_bits(evaluate("mad.hi.sat.s32 d, a, b, c;", a=a, b=b, c=c, d=np.int32), want)


def low24(x: int, t: str) -> int:
    x &= 0xFFFFFF
    return x - (1 << 24) if t == "s32" and x >> 23 else x


@pytest.mark.parametrize("t", ["u32", "s32"])
@pytest.mark.parametrize(("part", "shift"), [("lo", 0), ("hi", 16)])
def test_24_bits(t, part, shift):
    a, b = product(integers(t), integers(t))
    c = np.roll(a, 3)
    product24 = expect(lambda x, y: low24(x, t) * low24(y, t) >> shift, a.dtype, a, b)
    same_bits(evaluate(f"mul24.{part}.{t} d, a, b;", a=a, b=b, d=a.dtype), product24)
    want = expect(lambda p, z: p + z, a.dtype, product24, c)
    same_bits(evaluate(f"mad24.{part}.{t} d, a, b, c;", a=a, b=b, c=c, d=a.dtype), want)


@pytest.mark.parametrize("types", ["u32.u32", "u32.s32", "s32.u32", "s32.s32"])
def test_dot_products(types):
    a, b = product(unsigned(32), np.array([0x80FF017F, 0x12345678, 0xFFFFFFFF], np.uint32))
    c = np.roll(a, 2)
    left, right = types.split(".")

    def part(x, width, n, t):
        v = x >> width * n & ((1 << width) - 1)
        return v - (1 << width) if t == "s32" and v >> (width - 1) else v

    def dp4a(x, y, z):
        return z + sum(part(x, 8, n, left) * part(y, 8, n, right) for n in range(4))

    got = evaluate(f"dp4a.{types} d, a, b, c;", a=a, b=b, c=c, d=np.uint32)
    same_bits(got, expect(dp4a, np.uint32, a, b, c))
    for half, first in (("lo", 0), ("hi", 2)):

        def dp2a(x, y, z, first=first):
            return z + sum(part(x, 16, n, left) * part(y, 8, n + first, right) for n in range(2))

        got = evaluate(f"dp2a.{half}.{types} d, a, b, c;", a=a, b=b, c=c, d=np.uint32)
        same_bits(got, expect(dp2a, np.uint32, a, b, c))


def test_carries_add_128_bits():
    rng = np.random.default_rng(0)
    x = [int(v) << 96 | int(w) for v, w in rng.integers(0, 2**31, (64, 2))] + [2**128 - 1, 0]
    y = [int(v) << 64 | int(w) << 31 for v, w in rng.integers(0, 2**31, (64, 2))] + [1, 1]

    def words(values):
        return {
            n: np.array([v >> 32 * n & 0xFFFFFFFF for v in values], np.uint32) for n in range(4)
        }

    a, b = words(x), words(y)
    inputs = {f"a{n}": a[n] for n in range(4)} | {f"b{n}": b[n] for n in range(4)}
    for first, middle, last, sign in (
        ("add.cc", "addc.cc", "addc", 1),
        ("sub.cc", "subc.cc", "subc", -1),
    ):
        code = f"{first}.u32 d0, a0, b0; {middle}.u32 d1, a1, b1; {middle}.u32 d2, a2, b2;"
        code += f"{last}.u32 d3, a3, b3;"
        got = evaluate(code, **inputs, **{f"d{n}": np.uint32 for n in range(4)})
        want = words([(v + sign * w) % 2**128 for v, w in zip(x, y, strict=True)])
        for n in range(4):
            same_bits(got[n], want[n], (first, n))


def test_carries_multiply_64_bits():
    a, b = product(unsigned(64), unsigned(64))
    low = {"a0": a.astype(np.uint32), "a1": (a >> 32).astype(np.uint32)}
    low |= {"b0": b.astype(np.uint32), "b1": (b >> 32).astype(np.uint32)}
    code = """
    mul.lo.u32 d0, a0, b0;       mul.hi.u32 d1, a0, b0;
    mad.lo.cc.u32 d1, a1, b0, d1; madc.hi.u32 d2, a1, b0, 0;
    mad.lo.cc.u32 d1, a0, b1, d1; madc.hi.cc.u32 d2, a0, b1, d2; addc.u32 d3, 0, 0;
    mad.lo.cc.u32 d2, a1, b1, d2; madc.hi.u32 d3, a1, b1, d3;
    """
    got = evaluate(code, **low, **{f"d{n}": np.uint32 for n in range(4)})
    products = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    for n in range(4):
        want = np.array([p >> 32 * n & 0xFFFFFFFF for p in products], np.uint32)
        same_bits(got[n], want, n)


def test_predicates():
    p, q = product(np.array([False, True]), np.array([False, True]))
    for name, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        assert (evaluate(f"{name}.pred d, p, q;", p=p, q=q, d=bool) == f(p, q)).all()
        assert (evaluate(f"{name}.pred d, p, !q;", p=p, q=q, d=bool) == f(p, ~q)).all()
    assert (evaluate("not.pred d, p;", p=p, d=bool) == ~p).all()
    assert (evaluate("mov.pred d, p;", p=p, d=bool) == p).all()


def test_an_unknown_modifier_is_not_ignored():
    a = np.ones(4, np.uint32)
    for opcode in ("add.sat.u32", "add.rn.u32", "shl.wrap.b32", "frob.u32", "max.NaN.u32"):
        with pytest.raises(PtxError, match=f"unknown opcode {opcode}"):
            evaluate(f"{opcode} d, a, a;", a=a, d=np.uint32)
