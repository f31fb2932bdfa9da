# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic, logic and fields of bits against the PTX manual, in Python's integers."""

import numpy as np
import pytest
from ptx_kernels import evaluate, integers, needs_build, product, same_bits, unsigned

from softgpu.ptx import PtxError

pytestmark = needs_build

ALL = ("u16", "s16", "u32", "s32", "u64", "s64")
WORDS = ("u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")


def wrap(value: int, dtype: np.dtype) -> int:
    bits = 8 * dtype.itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if dtype.kind == "i" and value >> (bits - 1) else value


def expect(function, dtype, *arrays) -> np.ndarray:
    dtype = np.dtype(dtype)
    rows = zip(*(a.tolist() for a in arrays), strict=True)
    return np.array([wrap(function(*row), dtype) for row in rows], dtype)


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


UNARY = {
    "neg": (("s16", "s32", "s64"), lambda a, n: -a),
    "abs": (("s16", "s32", "s64"), lambda a, n: abs(a)),
    "not": (BITS, lambda a, n: ~a),
    "cnot": (BITS, lambda a, n: int(a == 0)),
    "brev": (("b32", "b64"), lambda a, n: int(f"{a:0{n}b}"[::-1], 2)),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    types, function = UNARY[name]
    for t in types:
        a = integers(t)
        n = int(t[1:])
        want = expect(lambda x, n=n: function(x, n), a.dtype, a)
        same_bits(evaluate(f"{name}.{t} d, a;", a=a, d=a.dtype), want, t)


def highest(x: int) -> int:
    return (~x if x < 0 else x).bit_length() - 1


@pytest.mark.parametrize("t", WORDS)
def test_positions_of_bits(t):
    a, n = integers(t), int(t[1:])
    bits = a.view(f"u{n // 8}").tolist()
    b = "b" + t[1:]
    popc = evaluate(f"popc.{b} d, a;", a=a, d=np.uint32)
    assert popc.tolist() == [x.bit_count() for x in bits]
    clz = evaluate(f"clz.{b} d, a;", a=a, d=np.uint32)
    assert clz.tolist() == [n - x.bit_length() for x in bits]
    find = evaluate(f"bfind.{t} d, a;", a=a, d=np.int32)
    assert find.tolist() == [highest(x) for x in a.tolist()]
    shift = evaluate(f"bfind.shiftamt.{t} d, a;", a=a, d=np.int32)
    assert shift.tolist() == [-1 if highest(x) < 0 else n - 1 - highest(x) for x in a.tolist()]


AMOUNTS = np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 255, 2**31, 2**32 - 1], np.uint32)


@pytest.mark.parametrize("t", ALL)
def test_shifts_clamp_their_amount(t):
    a, b = product(integers(t), AMOUNTS)
    want = expect(lambda x, s: x << s if s < 64 else 0, a.dtype, a, b)
    same_bits(evaluate(f"shl.b{t[1:]} d, a, b;", a=a, b=b, d=a.dtype), want)
    want = expect(lambda x, s: x >> min(s, 64), a.dtype, a, b)
    same_bits(evaluate(f"shr.{t} d, a, b;", a=a, b=b, d=a.dtype), want)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    a, b, c = product(unsigned(32)[:9], unsigned(32)[9:18], AMOUNTS)

    def amount(s: int) -> int:
        return s & 31 if mode == "wrap" else min(s, 32)

    want = expect(lambda x, y, s: ((y << 32 | x) << amount(s)) >> 32, np.uint32, a, b, c)
    same_bits(evaluate(f"shf.l.{mode}.b32 d, a, b, c;", a=a, b=b, c=c, d=np.uint32), want)
    want = expect(lambda x, y, s: (y << 32 | x) >> amount(s), np.uint32, a, b, c)
    same_bits(evaluate(f"shf.r.{mode}.b32 d, a, b, c;", a=a, b=b, c=c, d=np.uint32), want)


POSITIONS = np.array([0, 1, 5, 16, 31, 32, 40, 63, 64, 200, 255, 256 + 4], np.uint32)


def extract(x: int, position: int, length: int, t: str) -> int:
    """The manual's loop, bit by bit."""
    msb, position, length = int(t[1:]) - 1, position & 255, length & 255
    sign = t[0] == "s" and length > 0 and (x >> min(position + length - 1, msb)) & 1
    bits = [
        (x >> (position + n)) & 1 if n < length and position + n <= msb else sign
        for n in range(msb + 1)
    ]
    return sum(int(b) << n for n, b in enumerate(bits))


@pytest.mark.parametrize("t", WORDS)
def test_bit_field_extract(t):
    a, b, c = product(integers(t)[::3], POSITIONS, POSITIONS)
    want = expect(lambda x, p, n: extract(x, p, n, t), a.dtype, a, b, c)
    same_bits(evaluate(f"bfe.{t} d, a, b, c;", a=a, b=b, c=c, d=a.dtype), want)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits):
    a, c, e = product(unsigned(bits)[::3], POSITIONS, POSITIONS)
    b = np.roll(a, 7)

    def insert(x, y, position, length):
        position, length = position & 255, length & 255
        for n in range(length):
            if position + n < bits:
                y = y & ~(1 << (position + n)) | (x >> n & 1) << (position + n)
        return y

    got = evaluate(f"bfi.b{bits} d, a, b, c, e;", a=a, b=b, c=c, e=e, d=a.dtype)
    same_bits(got, expect(insert, a.dtype, a, b, c, e))


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_masks_and_sign_extension(mode):
    a, b = product(POSITIONS, POSITIONS)

    def mask(position, length):
        if mode == "wrap":
            position, length = position & 31, length & 31
        return 0 if position > 31 else ((1 << min(length, 32)) - 1) << position

    got = evaluate(f"bmsk.{mode}.b32 d, a, b;", a=a, b=b, d=np.uint32)
    same_bits(got, expect(mask, np.uint32, a, b))
    for t in ("u32", "s32"):
        a, b = product(integers(t), POSITIONS)

        def extend(x, length, t=t):
            length = length & 31 if mode == "wrap" else min(length, 32)
            low = x & ((1 << length) - 1)
            return low - (1 << length) if t == "s32" and length and low >> (length - 1) else low

        got = evaluate(f"szext.{mode}.{t} d, a, b;", a=a, b=b, d=a.dtype)
        same_bits(got, expect(extend, a.dtype, a, b))


def test_find_nth_set():
    a, b, c = product(
        unsigned(32), np.array([0, 3, 16, 31], np.uint32), np.array([0, 1, 2, -1, -2], np.int32)
    )

    def nth(x, start, n):
        if n == 0:
            return start if x >> start & 1 else 0xFFFFFFFF
        places = range(start, 32) if n > 0 else range(start, -1, -1)
        found = [p for p in places if x >> p & 1]
        return found[abs(n) - 1] if len(found) >= abs(n) else 0xFFFFFFFF

    got = evaluate("fns.b32 d, a, b, c;", a=a, b=b, c=c, d=np.uint32)
    same_bits(got, expect(nth, np.uint32, a, b, c))


# The manual's tables, most significant byte first.
PERMUTE_MODES = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def permute(a: int, b: int, selectors: list[int]) -> int:
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    out = []
    for s in selectors:
        byte = source[s & 7]
        out.append((255 if byte & 128 else 0) if s & 8 else byte)
    return int.from_bytes(out, "little")


def test_prmt():
    selectors = np.array([0x3210, 0x7654, 0xFEDC, 0x0123, 0x89AB, 0x4C4C, 0xFFFF8888], np.uint32)
    a, b, c = product(unsigned(32), np.array([0x80FF017F, 0x12345678], np.uint32), selectors)
    want = expect(
        lambda x, y, s: permute(x, y, [s >> 4 * n & 15 for n in range(4)]), np.uint32, a, b, c
    )
    same_bits(evaluate("prmt.b32 d, a, b, c;", a=a, b=b, c=c, d=np.uint32), want)


@pytest.mark.parametrize("mode", PERMUTE_MODES)
def test_prmt_modes(mode):
    a, c = product(np.array([0x03020100, 0xDEADBEEF], np.uint32), np.arange(8, dtype=np.uint32))
    b = np.full_like(a, 0x07060504)
    want = expect(
        lambda x, y, s: permute(x, y, [int(k) for k in PERMUTE_MODES[mode][s & 3][::-1]]),
        np.uint32, a, b, c,
    )  # fmt: skip
    same_bits(evaluate(f"prmt.b32.{mode} d, a, b, c;", a=a, b=b, c=c, d=np.uint32), want)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B, 0xFF])
def test_lop3(table):
    a, b, c = product(unsigned(32)[::2], unsigned(32)[1::3], unsigned(32)[::4])

    def look_up(x, y, z):
        return sum(
            (table >> ((x >> n & 1) << 2 | (y >> n & 1) << 1 | z >> n & 1) & 1) << n
            for n in range(32)
        )

    want = expect(look_up, np.uint32, a, b, c)
    same_bits(evaluate(f"lop3.b32 d, a, b, c, {table};", a=a, b=b, c=c, d=np.uint32), want)
    q = np.arange(len(a)) % 2 == 0
    for logic, f in (("or", np.logical_or), ("and", np.logical_and), ("xor", np.logical_xor)):
        d, p = evaluate(
            f"lop3.{logic}.b32 d|p, a, b, c, {table}, q;",
            a=a, b=b, c=c, q=q, d=np.uint32, p=bool,
        )  # fmt: skip
        same_bits(d, want)
        assert (p == f(want != 0, q)).all(), logic


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
