# SPDX-License-Identifier: Apache-2.0
"""Tensor cores: fragments as the manual lays them out, and products of small integers, which are
exact in any order."""

import numpy as np
import pytest
from ptx_kernels import launch, needs_build

from softgpu.ptx import PtxError

pytestmark = needs_build

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4


def store_all(registers: list[str]) -> str:
    text = f"mad.wide.u32 %rl0, %t, {4 * len(registers)}, %rd1;"
    return text + "".join(f"st.global.b32 [%rl0+{4 * n}], {r};" for n, r in enumerate(registers))


def load_all(registers: list[str], array: int) -> str:
    text = f"mad.wide.u32 %rl0, %t, {4 * len(registers)}, %rd{array};"
    return text + "".join(f"ld.global.b32 {r}, [%rl0+{4 * n}];" for n, r in enumerate(registers))


SHAPES = {
    # elements: A's type, their count per register, k
    "m16n8k16.row.col.f32.bf16.bf16.f32": ("bf16", 2, 16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": ("bf16", 2, 8),
    "m16n8k16.row.col.f32.f16.f16.f32": ("f16", 2, 16),
    "m16n8k8.row.col.f32.f16.f16.f32": ("f16", 2, 8),
    "m16n8k8.row.col.f32.tf32.tf32.f32": ("tf32", 1, 8),
    "m16n8k4.row.col.f32.tf32.tf32.f32": ("tf32", 1, 4),
    "m16n8k16.row.col.s32.s8.s8.s32": ("s8", 4, 16),
    "m16n8k32.row.col.s32.s8.s8.s32": ("s8", 4, 32),
    "m16n8k32.row.col.s32.u8.u8.s32": ("u8", 4, 32),
}


def packed(values: np.ndarray, t: str) -> np.ndarray:
    """Rows of elements as words of 32 bits."""
    if t == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
    kinds = {"f16": np.float16, "tf32": np.float32, "s8": np.int8, "u8": np.uint8}
    return values.astype(kinds[t]).view(np.uint32)


@pytest.mark.parametrize("shape", SHAPES)
def test_mma(shape):
    t, per, k = SHAPES[shape]
    rng = np.random.default_rng(0)
    low = 0 if t == "u8" else -8
    a, b = rng.integers(low, 9, (16, k)), rng.integers(low, 9, (k, 8))
    c = rng.integers(-100, 100, (16, 8))
    words_a = packed(np.ascontiguousarray(a), t)  # 16 x (k / per)
    words_b = packed(np.ascontiguousarray(b.T), t)  # 8 x (k / per)
    steps = k // per // 4
    in_a = [words_a[GROUP + 8 * half, 4 * s + IN_GROUP] for s in range(steps) for half in (0, 1)]
    in_b = [words_b[GROUP, 4 * s + IN_GROUP] for s in range(steps)]
    places = [(GROUP + 8 * (n // 2), 2 * IN_GROUP + n % 2) for n in range(4)]
    number = np.int32 if "s32" in shape else np.float32
    in_c = [c[place].astype(number).view(np.uint32) for place in places]
    fragments = np.stack([*in_a, *in_b, *in_c], 1).astype(np.uint32)
    names = [f"%r{n}" for n in range(fragments.shape[1])]
    cut = (len(in_a), len(in_a) + len(in_b))
    lists = [", ".join(names[s]) for s in (slice(cut[0]), slice(*cut), slice(cut[1], None))]
    body = load_all(names, 0)
    body += f"mma.sync.aligned.{shape} {{%r60, %r61, %r62, %r63}}, "
    body += ", ".join(f"{{{names}}}" for names in lists) + ";"
    out = np.zeros((32, 4), np.uint32)
    launch(body + store_all(["%r60", "%r61", "%r62", "%r63"]), fragments, out)
    want = a @ b + c
    for n, place in enumerate(places):
        assert (out[:, n].view(number) == want[place]).all(), n


def test_tf32_ignores_the_lower_bits():
    one = np.full((32, 1), 0x3F801FFF, np.uint32)
    body = load_all(["%r0"], 0) + "mov.b32 %r1, 0;"
    body += "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r2, %r3, %r4, %r5}, {%r0, %r0},"
    body += "{%r0}, {%r1, %r1, %r1, %r1};"
    out = np.zeros((32, 1), np.float32)
    launch(body + store_all(["%r2"]), one, out)
    assert (out == 4).all()


def test_mma_needs_the_whole_warp():
    body = """setp.lt.u32 %p0, %lane, 16; @%p0 bra part; bra end;
    part: mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6},
    {%r0, %r1, %r2, %r3}; end:"""
    with pytest.raises(PtxError, match="not all 32 lanes are here"):
        launch(body, np.zeros(1))
    with pytest.raises(PtxError, match=r"unknown opcode mma.*f16\.f16\.f16"):
        launch("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0, %r1}, {%r2, %r3, %r4, %r5},"
               "{%r6, %r7}, {%r0, %r1};", np.zeros(1))  # fmt: skip


# --- matrices of 8 x 8 elements of 16 bits

MATRICES = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
ROWS = """.shared .align 16 .b8 s[512]; mov.u32 %r30, s; mad.lo.u32 %r31, %t, 16, %r30;
"""
FILL = "mad.wide.u32 %rl1, %t, 16, %rd0; ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%rl1];"
FILL += "st.shared.v4.u32 [%r31], {%r0, %r1, %r2, %r3}; bar.sync 0;"


def in_lanes(m: np.ndarray) -> np.ndarray:
    """Lane l has elements 2 * (l % 4) and the next of row l / 4."""
    pair = m[GROUP, 2 * IN_GROUP].astype(np.uint32), m[GROUP, 2 * IN_GROUP + 1].astype(np.uint32)
    return pair[0] | pair[1] << 16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    registers = [f"%r{10 + n}" for n in range(count)]
    trans = ".trans" if transposed else ""
    body = ROWS + FILL + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 "
    body += f"{{{', '.join(registers)}}}, [%r31];" + store_all(registers)
    out = np.zeros((32, count), np.uint32)
    launch(body, MATRICES, out, settings="check=1")
    for n in range(count):
        m = MATRICES[n]
        assert (out[:, n] == in_lanes(m.T if transposed else m)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed):
    fragments = np.stack([in_lanes(m) for m in MATRICES[:count]], 1).astype(np.uint32)
    registers = [f"%r{10 + n}" for n in range(count)]
    trans = ".trans" if transposed else ""
    body = ROWS + load_all(registers, 0) + "mov.u32 %r0, 0;"
    body += "st.shared.v4.u32 [%r31], {%r0, %r0, %r0, %r0}; bar.sync 0;"
    body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r31], "
    body += f"{{{', '.join(registers)}}}; bar.sync 0;"
    body += "ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%r31];"
    out = np.zeros((32, 4), np.uint32)
    launch(body + store_all(["%r0", "%r1", "%r2", "%r3"]), fragments, out, settings="check=1")
    want = np.zeros_like(MATRICES)
    want[:count] = MATRICES[:count].transpose(0, 2, 1) if transposed else MATRICES[:count]
    assert (out.view(np.uint16).reshape(4, 8, 8) == want).all()


def test_movmatrix():
    fragment = in_lanes(MATRICES[1]).astype(np.uint32)
    body = load_all(["%r0"], 0) + "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;"
    out = np.zeros(32, np.uint32)
    launch(body + store_all(["%r1"]), fragment, out)
    assert (out == in_lanes(MATRICES[1].T)).all()


def test_ldmatrix_rows_are_aligned():
    body = ROWS + "add.u32 %r31, %r31, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r31];"
    with pytest.raises(PtxError, match="is not a multiple of 16"):
        launch(body, np.zeros(1))
