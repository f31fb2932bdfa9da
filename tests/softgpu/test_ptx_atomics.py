# SPDX-License-Identifier: Apache-2.0
"""PTX: atomics, all lanes of two warps on one word, and each on its own."""

import numpy as np
import pytest
from ptx_kernels import launch, needs_build, same_bits
from ptx_memory_kernels import AT, I32, U32

pytestmark = needs_build


ATOMICS = {
    "add.u32": lambda x, start: (start + int(x.astype(np.uint64).sum())) % 2**32,
    "add.s32": lambda x, start: (start + int(x.astype(np.uint64).sum())) % 2**32,
    "min.s32": lambda x, start: min(*x.view(I32).tolist(), start) % 2**32,
    "max.s32": lambda x, start: max(*x.view(I32).tolist(), start) % 2**32,
    "min.u32": lambda x, start: min(*x.tolist(), start),
    "max.u32": lambda x, start: max(*x.tolist(), start),
    "and.b32": lambda x, start: int(np.bitwise_and.reduce(x)) & start,
    "or.b32": lambda x, start: int(np.bitwise_or.reduce(x)) | start,
    "xor.b32": lambda x, start: int(np.bitwise_xor.reduce(x)) ^ start,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics_lose_nothing(name, space):
    x = np.random.default_rng(3).integers(0, 2**32, 64).astype(U32)
    out = np.full(1, 7, U32)
    place = "[%rd1]" if space == "global" else "[word]"
    body = ".shared .u32 word; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [word], 7; bar.sync 0;"
    body += AT.format(4, 0) + "ld.global.u32 %r1, [%rl0];"
    for opcode in (f"atom.relaxed.gpu.{space}.{name} %r2, ", f"red.{space}.{name} "):
        out[:] = 7
        text = body + f"{opcode}{place}, %r1; bar.sync 0;"
        if space == "shared":
            text += "ld.shared.u32 %r3, [word]; st.global.u32 [%rd1], %r3;"
        launch(text, x, out, block=64)
        assert out[0] == ATOMICS[name](x, 7), opcode


@pytest.mark.parametrize("name", ["add.u64", "add.s64", "max.u64", "max.s64", "min.s64", "min.u64",
                                  "and.b64", "or.b64", "xor.b64"])  # fmt: skip
def test_atomics_of_64_bits(name):
    x = np.random.default_rng(4).integers(0, 2**63, 32).astype(np.uint64) * np.uint64(2)
    out = np.full(1, 7, np.uint64)
    launch(AT.format(8, 0) + f"ld.global.u64 %rl1, [%rl0]; red.global.{name} [%rd1], %rl1;", x, out)
    values = [*(x.view(np.int64) if ".s" in name else x).tolist(), 7]
    f = {
        "add": sum, "max": max, "min": min,
        "and": lambda v: np.bitwise_and.reduce(np.array(v, np.uint64)).item(),
        "or": lambda v: np.bitwise_or.reduce(np.array(v, np.uint64)).item(),
        "xor": lambda v: np.bitwise_xor.reduce(np.array(v, np.uint64)).item(),
    }[name.split(".")[0]]  # fmt: skip
    assert out[0] == f(values) % 2**64


def test_atomics_return_what_was_there():
    out, old = np.zeros(1, U32), np.zeros(64, U32)
    body = "atom.add.u32 %r1, [%rd0], 3;" + AT.format(4, 1) + "st.global.u32 [%rl0], %r1;"
    launch(body, out, old, block=64)
    assert sorted(old.tolist()) == list(range(0, 192, 3))


def test_increment_and_decrement_wrap():
    for name, start, want in (
        ("inc", 3, [3, 4, 5, 0, 1]),
        ("dec", 1, [1, 0, 5, 4, 3]),
        ("dec", 9, [9, 5, 4]),
    ):
        out, old = np.full(1, start, U32), np.zeros(len(want), U32)
        body = f"atom.global.{name}.u32 %r1, [%rd0], 5;"
        launch(body + AT.format(4, 1) + "st.global.u32 [%rl0], %r1;", out, old, block=len(want))
        assert old.tolist() == want


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap(bits):
    dtype = np.dtype(f"u{bits // 8}")
    register = {16: "%rs", 32: "%r", 64: "%rl"}[bits]
    data = (np.arange(32) % 3).astype(dtype)
    old = np.zeros(32, dtype)
    body = AT.format(bits // 8, 0) + f"mov.b{bits} {register}5, 1; mov.b{bits} {register}6, 200;"
    body += f"atom.global.cas.b{bits} {register}7, [%rl0], {register}5, {register}6;"
    launch(body + AT.format(bits // 8, 1) + f"st.global.b{bits} [%rl0], {register}7;", data, old)
    before = (np.arange(32) % 3).astype(dtype)
    same_bits(old, before)
    same_bits(data, np.where(before == 1, 200, before).astype(dtype))


def test_exchanges_of_all_widths():
    body = ".reg .b128 q, z; " + AT.format(16, 0)
    body += "mov.u64 %rl2, 5; mov.u64 %rl3, 6; mov.b128 q, {%rl2, %rl3};"
    body += "atom.global.exch.b128 z, [%rl0], q;"
    body += AT.format(16, 1) + "st.global.b128 [%rl0], z;"
    body += "atom.global.cas.b128 z, [%rl0], z, q;"
    data = np.arange(64, dtype=np.uint64)
    out = np.zeros(64, np.uint64)
    launch(body, data, out)
    assert (data.reshape(-1, 2) == [5, 6]).all()
    assert (out.reshape(-1, 2) == [5, 6]).all()
    word, old = np.full(1, 9, np.uint64), np.zeros(1, np.uint64)
    launch("atom.exch.b64 %rl1, [%rd0], 4; st.u64 [%rd1], %rl1;", word, old, block=1)
    assert (word[0], old[0]) == (4, 9)


@pytest.mark.parametrize(("t", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_atomic_sums_of_floats(t, dtype):
    x = np.random.default_rng(5).standard_normal(32).astype(dtype)
    out = np.ones(1, dtype)
    register = "%f0" if t == "f32" else "%fd0"
    body = AT.format(dtype().itemsize, 0) + f"ld.global.{t} {register}, [%rl0];"
    launch(body + f"red.global.add.{t} [%rd1], {register};", x, out)
    total = dtype(1)
    for value in x:
        total += value
    assert out[0] == total


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_atomics_of_halves(t):
    values = np.array([1.0, 2.5, -3.0, 0.125] * 8, np.float32)
    bits = (
        values.astype(np.float16).view(np.uint16)
        if t == "f16"
        else (values.view(U32) >> 16).astype(np.uint16)
    )
    for name, f in (("add.noftz", sum), ("max.noftz", max), ("min.noftz", min)):
        out = np.zeros(1, np.uint16)
        body = AT.format(2, 0) + f"ld.global.b16 %rs0, [%rl0]; red.global.{name}.{t} [%rd1], %rs0;"
        launch(body, bits, out)
        got = out.view(np.float16)[0] if t == "f16" else (out.astype(U32) << 16).view(np.float32)[0]
        assert got == f([*values.tolist(), 0.0]), name
        pair = bits.astype(U32) | bits[::-1].astype(U32) << 16
        out, old = np.zeros(1, U32), np.zeros(32, U32)
        body = (
            AT.format(4, 0)
            + f"ld.global.b32 %r0, [%rl0]; atom.global.{name}.{t}x2 %r1, [%rd1], %r0;"
        )
        launch(body + AT.format(4, 2) + "st.global.u32 [%rl0], %r1;", pair, out, old)
        assert out[0] & 0xFFFF == out[0] >> 16
        assert old[0] == 0
        assert len(set(old.tolist())) > 2
