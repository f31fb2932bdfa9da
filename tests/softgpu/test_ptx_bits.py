# SPDX-License-Identifier: Apache-2.0
"""PTX: bits, shifts, fields and permutations against Python."""

import numpy as np
import pytest
from ptx_integers import ALL, BITS, expect
from ptx_kernels import evaluate, integers, needs_build, product, same_bits, unsigned

pytestmark = needs_build


WORDS = ("u32", "s32", "u64", "s64")

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
