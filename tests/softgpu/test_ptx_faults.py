# SPDX-License-Identifier: Apache-2.0
"""Faults planted in PTX, one at a time: each gives a wrong result or a report."""

import re

import numpy as np
import pytest
from ptx_kernels import launch, needs_build

from softgpu.ptx import PtxError

pytestmark = needs_build

# The largest and the number of values below a bound, of each of four warps, then of the block.
REDUCE = """
.shared .align 4 .b8 s[32]; mov.u32 %r20, s;
mad.wide.u32 %rl1, %t, 4, %rd0; ld.global.u32 %r1, [%rl1];
redux.sync.max.u32 %r2, %r1, -1;
setp.lt.s32 %p1, %r1, 1000; selp.u32 %r3, 1, 0, %p1;
shfl.sync.bfly.b32 %r4, %r3, 16, 31, -1; add.u32 %r3, %r3, %r4;
shfl.sync.bfly.b32 %r4, %r3, 8, 31, -1; add.u32 %r3, %r3, %r4;
shfl.sync.bfly.b32 %r4, %r3, 4, 31, -1; add.u32 %r3, %r3, %r4;
shfl.sync.bfly.b32 %r4, %r3, 2, 31, -1; add.u32 %r3, %r3, %r4;
shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1; add.u32 %r3, %r3, %r4;
setp.eq.u32 %p2, %lane, 0; shr.u32 %r5, %t, 5; mad.lo.u32 %r6, %r5, 8, %r20;
@%p2 st.shared.v2.u32 [%r6], {%r2, %r3};
bar.sync 0;
setp.ge.u32 %p3, %t, 4; @%p3 bra end;
mad.lo.u32 %r6, %t, 8, %r20; ld.shared.v2.u32 {%r2, %r3}, [%r6];
redux.sync.max.u32 %r2, %r2, 0xf; redux.sync.add.u32 %r3, %r3, 0xf;
setp.ne.u32 %p4, %t, 0; @%p4 bra end;
st.global.v2.u32 [%rd1], {%r2, %r3};
end:
"""


def reduce(text: str, settings: str) -> bool:
    x = np.random.default_rng(0).permutation(np.arange(936, 1064, dtype=np.uint32))
    out = np.zeros(2, np.uint32)
    launch(text, x, out, block=128, settings=settings)
    return out.tolist() == [1063, 64]


# A warp turns rows of eight into columns by way of shared memory, and counts by atomics.
TRANSPOSE = """
.shared .align 4 .b8 s[128]; .shared .align 4 .b8 n[16];
mov.u32 %r20, s; mov.u32 %r21, n; setp.lt.u32 %p0, %t, 4; mad.lo.u32 %r1, %t, 4, %r21;
@%p0 st.shared.u32 [%r1], 0;
mad.wide.u32 %rl1, %t, 4, %rd0; ld.global.u32 %r2, [%rl1];
mad.lo.u32 %r3, %t, 4, %r20; st.shared.u32 [%r3], %r2;
bar.warp.sync -1;
and.b32 %r4, %t, 3; shr.u32 %r5, %t, 2; mad.lo.u32 %r6, %r4, 8, %r5;
mad.lo.u32 %r7, %r6, 4, %r20; ld.shared.u32 %r8, [%r7];
mad.wide.u32 %rl2, %t, 4, %rd1; st.global.u32 [%rl2], %r8;
and.b32 %r9, %r2, 3; mad.lo.u32 %r10, %r9, 4, %r21;
atom.shared.add.u32 %r11, [%r10], 1;
match.any.sync.b32 %r12, %r9, -1; popc.b32 %r13, %r12;
bar.warp.sync -1;
ld.shared.u32 %r14, [%r10]; sub.u32 %r15, %r14, %r13; mul.lo.u32 %r15, %r15, 1000;
mad.wide.u32 %rl3, %t, 4, %rd2; st.global.u32 [%rl3], %r15;
"""


def transpose(text: str, settings: str) -> bool:
    x = np.random.default_rng(1).integers(0, 1000, 32).astype(np.uint32)
    out, zero = np.zeros(32, np.uint32), np.ones(32, np.uint32)
    launch(text, x, out, zero, settings=settings)
    return bool((out.reshape(8, 4) == x.reshape(4, 8).T).all() and (zero == 0).all())


# C (16 x 8) = A (16 x 32) * B (32 x 8) in two steps of 16: A row by row, B by .trans; copies in
# groups, two stages.
STEP = """
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r40, %r41, %r42, %r43}}, [%r30+{a}];
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r44, %r45}}, [%r31+{b}];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f0, %f1, %f2, %f3}},
{{%r40, %r41, %r42, %r43}}, {{%r44, %r45}}, {{%f0, %f1, %f2, %f3}};
"""
PRODUCT = (
    """
.shared .align 16 .b8 a[1024]; .shared .align 16 .b8 b[512]; mov.u32 %r20, a; mov.u32 %r21, b;
mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
shr.u32 %r1, %t, 1; and.b32 %r2, %t, 1; shl.b32 %r3, %r2, 4; mad.lo.u32 %r4, %r1, 64, %r3;
cvt.u64.u32 %rl1, %r4; add.u64 %rl2, %rd0, %rl1; mad.lo.u32 %r5, %r1, 32, %r3;
add.u32 %r6, %r20, %r5; mul.wide.u32 %rl3, %t, 16; add.u64 %rl4, %rd1, %rl3;
mad.lo.u32 %r7, %t, 16, %r21; setp.lt.u32 %p0, %t, 16;
cp.async.cg.shared.global [%r6], [%rl2], 16; @%p0 cp.async.cg.shared.global [%r7], [%rl4], 16;
cp.async.commit_group;
cp.async.cg.shared.global [%r6+512], [%rl2+32], 16;
@!%p0 cp.async.cg.shared.global [%r7], [%rl4], 16;
cp.async.commit_group;
and.b32 %r8, %t, 15; shr.u32 %r9, %t, 4; mul.lo.u32 %r9, %r9, 16; mad.lo.u32 %r10, %r8, 32, %r9;
add.u32 %r30, %r20, %r10; mad.lo.u32 %r31, %r8, 16, %r21;
cp.async.wait_group 1;
bar.sync 0;"""
    + STEP.format(a=0, b=0)
    + """cp.async.wait_group 0;
bar.sync 0;"""
    + STEP.format(a=512, b=256)
    + """
shr.u32 %r11, %t, 2; and.b32 %r12, %t, 3; mul.lo.u32 %r12, %r12, 8; mad.lo.u32 %r13, %r11, 32, %r12;
cvt.u64.u32 %rl5, %r13; add.u64 %rl6, %rd2, %rl5;
st.global.v2.f32 [%rl6], {%f0, %f1}; st.global.v2.f32 [%rl6+256], {%f2, %f3};
"""
)


def product(text: str, settings: str) -> bool:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-8, 9, (16, 32)), rng.integers(-8, 9, (32, 8))

    def bf16(x: np.ndarray) -> np.ndarray:
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    out = np.zeros((16, 8), np.float32)
    launch(text, bf16(a), bf16(b), out, settings=settings)
    return bool((out == a @ b).all())


KERNELS = {
    "reduce": (REDUCE, reduce),
    "transpose": (TRANSPOSE, transpose),
    "product": (PRODUCT, product),
}
MMA = r"(f3\},\s)\{%r40, %r41,"
# fault: kernel, pattern, what takes its place
FAULTS = {
    "redux.max becomes min": ("reduce", r"max(\.u32 %r2, %r1)", r"min\1"),
    "redux.max becomes add": ("reduce", r"max(\.u32 %r2, %r2)", r"add\1"),
    "setp.lt becomes le": ("reduce", r"setp\.lt\.s32", "setp.le.s32"),
    "setp.ge becomes gt": ("reduce", r"setp\.ge\.u32", "setp.gt.u32"),
    "a shuffle of half a warp": ("reduce", r"16, 31, -1", "16, 4127, -1"),
    "a shuffle by another distance": ("reduce", r"%r3, 8, 31", "%r3, 4, 31"),
    "a shuffle up": ("reduce", r"shfl\.sync\.bfly(\S+ %r4, %r3, 1,)", r"shfl.sync.up\1"),
    "no bar.sync": ("reduce", r"bar\.sync 0;", ""),
    "a barrier of fewer warps": ("reduce", r"bar\.sync 0;", "bar.sync 0, 64;"),
    "a mask of too few": ("reduce", r"%r2, 0xf;", "%r2, 0x7;"),
    "a mask of too many": ("reduce", r"%r2, 0xf;", "%r2, 0x1f;"),
    "a store without its guard": ("reduce", r"@%p2 st", "st"),
    "another warp's slot": ("reduce", r"shr\.u32 %r5, %t, 5", "shr.u32 %r5, %t, 6"),
    "no first bar.warp.sync": ("transpose", r"bar\.warp\.sync -1;\nand", "and"),
    "no last bar.warp.sync": ("transpose", r"bar\.warp\.sync -1;\nld", "ld"),
    "a barrier of each lane alone": ("transpose", r"bar\.warp\.sync -1;\nand",
        "shl.b32 %r9, 1, %lane; bar.warp.sync %r9;\nand"),
    "an atomic becomes load, add, store": (
        "transpose",
        r"atom\.shared\.add\.u32 %r11, \[%r10\], 1;",
        "ld.shared.u32 %r11, [%r10]; add.u32 %r11, %r11, 1; st.shared.u32 [%r10], %r11;",
    ),
    "match of another value": ("transpose", r"b32 %r12, %r9", "b32 %r12, %r2"),
    "match of half a warp": ("transpose", r"%r9, -1", "%r9, 65535"),
    "no zeros": ("transpose", r"@%p0 st\.shared\.u32 \[%r1\], 0;", ""),
    "cp.async.wait_group one too many": ("product", r"wait_group 0", "wait_group 1"),
    "the first cp.async.wait_group one too many": ("product", r"wait_group 1", "wait_group 2"),
    "no commit": ("product", r"cp\.async\.commit_group;\ncp", "cp"),
    "cp.async of half": ("product", r"\[%rl2\+32\], 16", "[%rl2+32], 16, 8"),
    "cp.async 16 bytes off": ("product", r"\[%rl2\+32\]", "[%rl2+48]"),
    "no first bar.sync": ("product", r"1;\nbar\.sync 0;", "1;"),
    "no second bar.sync": ("product", r"0;\nbar\.sync 0;", "0;"),
    "ldmatrix without .trans": ("product", r"\.trans", ""),
    "ldmatrix 16 bytes off": ("product", r"\[%r30\+512\]", "[%r30+528]"),
    "ldmatrix 8 bytes off": ("product", r"\[%r30\+512\]", "[%r30+520]"),
    "mma: two registers of A swapped": ("product", MMA, r"\1{%r41, %r40,"),
    "mma: two registers of B swapped": ("product", r"\{%r44, %r45\}, \{%f", "{%r45, %r44}, {%f"),
    "mma: f16 for bf16": ("product", r"f32\.bf16\.bf16", "f32.f16.f16"),
    "mma without its sum": ("product", r"mov\.f32 %f0, 0f00000000", "mov.f32 %f0, 0f3F800000"),
    "rows of C swapped": ("product", r"\[%rl6\+256\], \{%f2, %f3\}", "[%rl6+256], {%f3, %f2}"),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("settings", ["check=1", "order=reverse", "async=early", "order=random:3"])
def test_the_kernels_are_right(name, settings):
    text, works = KERNELS[name]
    assert works(text, settings)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault):
    name, pattern, instead = FAULTS[fault]
    text, works = KERNELS[name]
    changed, places = re.subn(pattern, instead, text)
    assert places
    try:
        right = works(changed, "check=1")
    except PtxError:
        return
    assert not right
