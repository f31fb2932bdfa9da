# SPDX-License-Identifier: Apache-2.0
"""PTX: loads, stores, spaces, calls, parameters."""

import numpy as np
import pytest
from ptx_kernels import launch, module, needs_build, same_bits
from ptx_memory_kernels import AT, U32

from softgpu import ptx
from softgpu.ptx import PtxError

pytestmark = needs_build


def copied(load: str, store: str, registers: str, source: np.ndarray, step: int) -> np.ndarray:
    """Each lane loads and stores `step` bytes."""
    out = np.zeros_like(source)
    body = AT.format(step, 0) + f"{load} {registers}, [%rl0];\n"
    body += AT.format(step, 1) + f"{store} [%rl0], {registers};"
    launch(body, source, out)
    return out


BYTES = np.random.default_rng(0).integers(0, 256, 32 * 32).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "registers", "step"),
    [
        ("u8", "%rs0", 1),
        ("b8", "%r0", 1),
        ("u16", "%rs0", 2),
        ("b32", "%r0", 4),
        ("f32", "%f0", 4),
        ("b64", "%rl1", 8),
        ("f64", "%fd0", 8),
        ("v2.u8", "{%rs0, %rs1}", 2),
        ("v4.u8", "{%rs0, %rs1, %rs2, %rs3}", 4),
        ("v2.b16", "{%rs0, %rs1}", 4),
        ("v4.u16", "{%rs0, %rs1, %rs2, %rs3}", 8),
        ("v2.u32", "{%r0, %r1}", 8),
        ("v4.f32", "{%f0, %f1, %f2, %f3}", 16),
        ("v2.u64", "{%rl1, %rl2}", 16),
        ("v4.b64", "{%rl1, %rl2, %rl3, %rl4}", 32),
        ("v8.b32", "{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}", 32),
    ],
)
def test_every_width(kind, registers, step):
    source = BYTES[: 32 * step].copy()
    for load, store in (
        ("ld.global.", "st.global."),
        ("ld.", "st."),
        ("ld.global.nc.L1::no_allocate.", "st.global.cs."),
        ("ld.volatile.global.", "st.volatile.global."),
        ("ld.relaxed.gpu.global.", "st.release.sys.global."),
        ("ldu.global.", "st.weak.global."),
    ):
        same_bits(copied(load + kind, store + kind, registers, source, step), source, load + kind)


def test_128_bits():
    body = ".reg .b128 q; " + AT.format(16, 0) + "ld.global.b128 q, [%rl0];"
    body += "mov.b128 {%rl1, %rl2}, q; xor.b64 %rl2, %rl2, 1; mov.b128 q, {%rl2, %rl1};"
    out = np.zeros(64, np.uint64)
    source = BYTES[:512].view(np.uint64).copy()
    launch(body + AT.format(16, 1) + "st.global.b128 [%rl0], q;", source, out)
    same_bits(out.reshape(-1, 2)[:, 1], source[::2])
    same_bits(out.reshape(-1, 2)[:, 0], source[1::2] ^ np.uint64(1))


@pytest.mark.parametrize(("t", "dtype"), [("s8", np.int8), ("u8", np.uint8), ("s16", np.int16)])
def test_narrow_loads_are_extended(t, dtype):
    source = BYTES[:64].view(dtype)[:32].copy()
    out = np.zeros(32, np.int32)
    body = AT.format(source.itemsize, 0) + f"ld.global.{t} %r0, [%rl0];"
    launch(body + AT.format(4, 1) + "st.global.u32 [%rl0], %r0;", source, out)
    same_bits(out, source.astype(np.int32))


def test_offsets_and_sinks():
    source, out = np.arange(64, dtype=np.uint32), np.zeros(32, np.uint32)
    body = AT.format(8, 0) + "add.s64 %rl0, %rl0, 8; ld.global.v2.u32 {_, %r0}, [%rl0+-8];"
    launch(body + AT.format(4, 1) + "st.global.u32 [%rl0+0], %r0;", source, out)
    same_bits(out, source[1::2])


def test_packing():
    out = np.zeros((32, 3), np.uint32)
    body = """
    mov.u32 %r0, 0x12345678; mov.b32 {%rs0, %rs1}, %r0; mov.b32 %r1, {%rs1, %rs0};
    mov.b64 %rl1, {%r0, %r1}; mov.b64 {%r2, %r3}, %rl1; mov.b64 {_, %r4}, %rl1;
    mov.b32 {%r0, _}, %r0;
    """.replace("mov.b32 {%r0, _}, %r0;", "")
    body += AT.format(12, 0) + "st.global.u32 [%rl0], %r1; st.global.u32 [%rl0+4], %r2;"
    launch(body + "st.global.u32 [%rl0+8], %r4;", out)
    assert (out == [0x56781234, 0x12345678, 0x56781234]).all()


def test_shared_memory_is_static_then_dynamic():
    body = (
        """
    .shared .align 16 .b8 fixed[256];
    mov.u32 %r1, fixed; mad.lo.u32 %r2, %t, 4, %r1; st.shared.u32 [%r2], %t;
    mov.u32 %r3, dynamic; mad.lo.u32 %r4, %t, 4, %r3; st.shared.u32 [%r4+4], %t;
    bar.warp.sync -1;
    xor.b32 %r5, %t, 1; mad.lo.u32 %r6, %r5, 4, %r1; ld.shared.u32 %r7, [%r6];
    mad.lo.u32 %r6, %r5, 4, %r3; ld.shared::cta.u32 %r8, [%r6+4];
    sub.u32 %r9, %r3, %r1; mov.u32 %r10, %dynamic_smem_size; mov.u32 %r11, %total_smem_size;
    """
        + AT.format(16, 0)
        + "st.global.v4.u32 [%rl0], {%r7, %r8, %r9, %r10};"
    )
    body += AT.format(4, 1) + "st.global.u32 [%rl0], %r11;"
    out, total = np.zeros((32, 4), np.uint32), np.zeros(32, np.uint32)
    launch(body, out, total, before=".extern .shared .align 64 .b8 dynamic[];", shared=132)
    other = np.arange(32) ^ 1
    assert (out == np.stack([other, other, other * 0 + 256, other * 0 + 132], 1)).all()
    assert (total == 388).all()


def test_generic_addresses():
    body = (
        """
    .shared .align 8 .b8 s[8]; .local .align 8 .b8 depot[16];
    mov.u64 %rl1, s; cvta.shared.u64 %rl2, %rl1; st.u32 [%rl2], 77;
    ld.shared.u32 %r1, [s];
    mov.u64 %rl3, depot; cvta.local.u64 %rl4, %rl3; st.u32 [%rl4+8], %lane;
    ld.local.u32 %r2, [depot+8];
    cvta.to.local.u64 %rl7, %rl4; ld.local.u32 %r3, [%rl7+8]; add.u32 %r2, %r2, %r3;
    cvta.to.shared.u64 %rl5, %rl2; ld.shared.u32 %r3, [%rl5]; cvta.to.global.u64 %rl6, %rd0;
    isspacep.shared %p0, %rl2; isspacep.shared %p1, %rl4; isspacep.local %p2, %rl4;
    isspacep.global %p3, %rd0; isspacep.global %p4, %rl2;
    selp.u32 %r4, 1, 0, %p0; selp.u32 %r5, 2, 0, %p1; selp.u32 %r6, 4, 0, %p2;
    selp.u32 %r7, 8, 0, %p3; selp.u32 %r8, 16, 0, %p4;
    add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6; add.u32 %r4, %r4, %r7; add.u32 %r4, %r4, %r8;
    """
        + AT.format(16, 0)
        + "st.global.v4.u32 [%rl0], {%r1, %r2, %r3, %r4};"
    )
    out = np.zeros((32, 4), np.uint32)
    launch(body, out)
    assert (out[:, 0] == 77).all()
    assert (out[:, 1] == 2 * np.arange(32)).all()
    assert (out[:, 2] == 77).all()
    assert (out[:, 3] == 1 + 4 + 8).all()


def test_hints_change_nothing():
    body = """prefetch.global.L2 [%rd0]; prefetchu.L1 [%rd0]; pmevent 1;
    createpolicy.fractional.L2::evict_first.b64 %rl5, 1.0;
    griddepcontrol.wait; griddepcontrol.launch_dependents;
    ld.global.L2::cache_hint.u32 %r1, [%rd0], %rl5; st.global.u32 [%rd0+4], %r1;"""
    data = np.array([5, 0], np.uint32)
    launch(body.replace("1.0;", "0f3F800000;"), data)
    assert data.tolist() == [5, 5]


VARIABLES = """
.const .align 4 .b8 table[8] = {1, 0, 0, 0, 0xff, 2};
.const .f32 half = 0f3F000000;
.global .align 8 .u64 pointer[2] = {generic(numbers), numbers+8};
.global .align 4 .u32 numbers[4] = {10, 20, 30};
.visible .global .u32 counter;
"""


def test_variables_of_a_module():
    body = (
        """
    ld.const.u32 %r0, [table]; ld.const.u16 %rs0, [table+4]; cvt.u32.u16 %r1, %rs0;
    ld.const.f32 %f0, [half]; ld.global.u64 %rl1, [pointer+8]; ld.u32 %r2, [%rl1];
    mov.u64 %rl2, numbers; cvta.global.u64 %rl3, %rl2; ld.u32 %r3, [%rl3+12];
    ld.global.u64 %rl4, [pointer]; ld.u32 %r5, [%rl4]; add.u32 %r2, %r2, %r5;
    mov.u64 %rl5, table; cvta.const.u64 %rl6, %rl5; ld.u32 %r6, [%rl6]; add.u32 %r0, %r0, %r6;
    red.global.add.u32 [counter], 1; bar.sync 0; ld.global.u32 %r4, [counter];
    """
        + AT.format(24, 0)
        + """st.global.v2.u32 [%rl0], {%r0, %r1};
    st.global.v2.u32 [%rl0+8], {%r2, %r3}; st.global.f32 [%rl0+16], %f0;
    st.global.u32 [%rl0+20], %r4;
    """
    )
    out = np.zeros((32, 6), np.uint32)
    launch(body, out, before=VARIABLES)
    assert (out == [2, 0x2FF, 40, 0, 0x3F000000, 32]).all()
    with pytest.raises(PtxError, match="variable away of another module"):
        launch("ld.global.u32 %r0, [away];", out, before=".extern .global .u32 away;")


FUNCTIONS = """
.func (.param .b32 result) twice(.param .b32 x)
{
  .reg .b32 %r<4>; .reg .pred %p<2>;
  ld.param.u32 %r0, [x];
  setp.lt.u32 %p0, %r0, 8;
  @%p0 bra SMALL;
  shl.b32 %r1, %r0, 1;
  st.param.b32 [result], %r1;
  ret;
SMALL:
  st.param.b32 [result], %r0;
  ret;
}
.func (.param .align 8 .b8 pair[8]) four(.param .b32 x, .param .b64 y)
{
  .reg .b32 %r<4>; .reg .b64 %rl<2>; .local .align 4 .b8 depot[4];
  ld.param.u32 %r0, [x]; ld.param.u64 %rl0, [y];
  st.local.u32 [depot], %r0;
  { .param .b32 a; .param .b32 b; st.param.b32 [a], %r0; call.uni (b), twice, (a);
    ld.param.b32 %r1, [b]; }
  { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a);
    ld.param.b32 %r1, [b]; }
  ld.local.u32 %r2, [depot];
  st.param.b32 [pair], %r1; st.param.b32 [pair+4], %r2; st.u32 [%rl0], %r1;
  ret;
}
.func nothing() { ret; }
"""

CALL = (
    """
call nothing;
{ .param .b32 p0; .param .b64 p1; .param .align 8 .b8 r[8];
  st.param.b32 [p0], %t; """
    + AT.format(4, 1)
    + """ st.param.b64 [p1], %rl0;
  call.uni (r), four, (p0, p1);
  ld.param.v2.b32 {%r1, %r2}, [r]; }
"""
)


def test_calls_with_divergence_inside():
    out, side = np.zeros((32, 2), np.uint32), np.zeros(32, np.uint32)
    text = CALL + "activemask.b32 %r3; setp.ne.u32 %p0, %r3, -1; @%p0 trap;"
    launch(
        text + AT.format(8, 0) + "st.global.v2.u32 [%rl0], {%r1, %r2};", out, side, before=FUNCTIONS
    )
    t = np.arange(32)
    want = np.where(t < 8, t, 4 * t)
    assert (out == np.stack([want, t], 1)).all()
    assert (side == want).all()


def test_a_guarded_call():
    out = np.zeros(32, np.uint32)
    body = """mov.u32 %r1, 5; setp.gt.u32 %p1, %t, 15;
    { .param .b32 a; .param .b32 b; st.param.b32 [a], %t;
    @%p1 call (b), twice, (a); @%p1 ld.param.b32 %r1, [b]; }"""
    launch(body + AT.format(4, 0) + "st.global.u32 [%rl0], %r1;", out, before=FUNCTIONS)
    t = np.arange(32)
    assert (out == np.where(t > 15, 2 * t, 5)).all()


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("call loop;", "loop calls itself"),
        ("call %rl1, ();", "a function pointer"),
        ("call elsewhere;", "unknown opcode call of elsewhere"),
    ],
)
def test_calls_that_are_not_possible(code, report):
    functions = ".extern .func elsewhere();\n.func loop() { call loop; ret; }\n"
    with pytest.raises(PtxError, match=report):
        launch(code, np.zeros(1), before=functions)


def test_assertions():
    before = """
    .extern .func __assertfail
    (.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 s);
    .global .align 1 .b8 message[6] = {120, 32, 62, 32, 48};
    .global .align 1 .b8 file[5] = {97, 46, 99, 117};
    """
    body = """
    setp.ne.u32 %p0, %t, 3; @%p0 bra fine;
    mov.u64 %rl1, message; cvta.global.u64 %rl2, %rl1;
    mov.u64 %rl3, file; cvta.global.u64 %rl4, %rl3;
    { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e;
    st.param.b64 [a], %rl2; st.param.b64 [b], %rl4; st.param.b32 [c], 12; st.param.b64 [d], %rl4;
    st.param.b64 [e], 1; call.uni __assertfail, (a, b, c, d, e); }
    fine:
    """
    with pytest.raises(PtxError, match=r"assertion failed: x > 0 in a\.cu, a\.cu:12 .*lanes 8,"):
        launch(body, np.zeros(1), before=before)


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("ld.global.u32 %r0, [%rd0+2];", "is not a multiple of 4"),
        ("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%rd0+8];", "is not a multiple of 16"),
        ("st.shared.u16 [s+1], %rs0;", "is not a multiple of 2"),
        ("ld.shared.u32 %r0, [s+64];", r"shared memory: offset 64 \+ 4 of 64"),
        ("st.shared.v4.u32 [s+64], {%r0, %r1, %r2, %r3};", "shared memory: offset 64"),
        ("ld.local.u32 %r0, [depot+16];", r"local memory: offset 16 \+ 4 of 16"),
        ("mov.u64 %rl1, 64; ld.global.u32 %r0, [%rl1];", "invalid address 0x40"),
        ("mov.u64 %rl1, 64; atom.global.add.u32 %r0, [%rl1], 1;", "invalid address 0x40"),
        ("cp.async.cg.shared.global [s+8], [%rd0], 16;", "cp.async: misaligned address"),
        ("cp.async.ca.shared.global [s], [%rd0], 4, 8;", "reads more than it writes"),
    ],
)
def test_bounds_and_alignment(code, report):
    body = ".shared .align 16 .b8 s[64]; .local .align 16 .b8 depot[16];\n" + code
    aligned = np.zeros(16, np.complex128)
    with pytest.raises(PtxError, match=report):
        launch(body, aligned)


def test_parameters():
    text = module(
        """.reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .b16 %rs<4>;
        ld.param.u64 %rd0, [out]; ld.param.u8 %rs0, [small]; ld.param.v2.u32 {%r1, %r2}, [block+8];
        cvt.u32.u16 %r3, %rs0; mov.b64 %rd1, block; ld.param.u32 %r4, [%rd1];
        st.global.v4.u32 [%rd0], {%r1, %r2, %r3, %r4};""",
        ".param .u64 out, .param .u8 small, .param .align 8 .b8 block[16]",
    )
    out = np.zeros(4, U32)
    block = np.arange(4, dtype=U32).tobytes()
    ptx.run_ptx(text, "kernel", 1, 1, [out, np.uint8(200), block])
    assert out.tolist() == [2, 3, 200, 0]
    with pytest.raises(PtxError, match="parameter 1 has 1 bytes, not 4"):
        ptx.run_ptx(text, "kernel", 1, 1, [out, np.int32(200), block])
    with pytest.raises(PtxError, match="3 parameters, not 1"):
        ptx.run_ptx(text, "kernel", 1, 1, [out])
    with pytest.raises(PtxError, match="no kernel other"):
        ptx.run_ptx(text, "other", 1, 1, [out])
    with pytest.raises(ValueError, match="not contiguous"):
        ptx.run_ptx(text, "kernel", 1, 1, [out[::2]])


def test_grids_of_three_dimensions():
    out = np.zeros(2 * 3 * 2 * 4 * 2 * 3, U32)
    body = """
    mov.u32 %r1, %ctaid.z; mov.u32 %r2, %nctaid.y; mov.u32 %r3, %ctaid.y;
    mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.z; mov.u32 %r3, %tid.z; mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.y; mov.u32 %r3, %tid.y; mad.lo.u32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.x; mad.lo.u32 %r1, %r1, %r2, %t;
    mad.wide.u32 %rl0, %r1, 4, %rd0; ld.global.u32 %r4, [%rl0]; add.u32 %r4, %r4, 1;
    st.global.u32 [%rl0], %r4;"""
    launch(body, out, grid=(2, 3, 2), block=(4, 2, 3))
    assert (out == 1).all()


def test_numbers_in_the_text():
    out = np.zeros(8, U32)
    body = """st.global.u32 [%rd0], 0x10; st.global.u32 [%rd0+4], -1; st.global.u32 [%rd0+8], 0b101;
    st.global.f32 [%rd0+12], 0f40490FDB; st.global.u32 [%rd0+16], WARP_SZ;
    st.global.u32 [%rd0+20], 5U;
    // a comment; with an opcode in it
    /* and another; trap; */
    st.global.f64 [%rd0+24], 0d400921FB54442D18;"""
    launch(body, out)
    assert out[:6].tolist() == [16, 0xFFFFFFFF, 5, 0x40490FDB, 32, 5]
    assert out[6:].view(np.float64)[0] == np.pi
