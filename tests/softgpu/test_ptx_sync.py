# SPDX-License-Identifier: Apache-2.0
"""Barriers, the checker of races, cp.async, and schedules."""

import numpy as np
import pytest
from ptx_kernels import launch, needs_build

from softgpu.ptx import PtxError

pytestmark = needs_build

SCHEDULES = [
    "order=forward",
    "order=reverse",
    *(f"order=random:{seed}" for seed in range(4)),
    "async=early",
    *(f"order=random:{seed} async=random:{seed}" for seed in range(4, 8)),
]
OUT = "mad.wide.u32 %rl9, %t, 4, %rd0; st.global.u32 [%rl9], %r0;"
SHARED = ".shared .align 16 .b8 s[1024]; mov.u32 %r30, s; mad.lo.u32 %r31, %t, 4, %r30;"


def run(code: str, block: int = 64, settings: str = "check=1", *arrays: np.ndarray) -> np.ndarray:
    out = np.zeros(block, np.uint32)
    launch(SHARED + code, out, *arrays, block=block, settings=settings)
    return out


# Each thread reads what the thread of the other warp wrote.
SWAP = (
    """st.shared.u32 [%r31], %t; {} xor.b32 %r1, %t, 32; mad.lo.u32 %r2, %r1, 4, %r30;
ld.shared.u32 %r0, [%r2];"""
    + OUT
)
SWAP_IN_WARP = SWAP.replace("xor.b32 %r1, %t, 32", "xor.b32 %r1, %t, 1")


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize(
    "barrier",
    ["bar.sync 0;", "barrier.sync 3;", "barrier.cta.sync.aligned 1, 64;", "bar.cta.sync 15;"],
)
def test_barriers_order_warps(barrier, settings):
    got = run(SWAP.format(barrier), 64, f"check=1 {settings}")
    assert (got == np.arange(64) ^ 32).all()


@pytest.mark.parametrize(
    ("code", "report"),
    [
        (SWAP.format(""), "nobody wrote|race of a"),
        (SWAP.format("bar.warp.sync -1;"), "nobody wrote|race of a"),
        (SWAP_IN_WARP.format(""), "race of a read: thread 0 at PTX line"),
        (SWAP_IN_WARP.format("shfl.sync.bfly.b32 %r5, %t, 1, 31, -1;"), "race of a read"),
        (SWAP_IN_WARP.format("vote.sync.all.pred %p5, %p0, -1;"), "race of a read"),
        (SWAP_IN_WARP.format("membar.cta;"), "race of a read"),
        ("st.shared.u32 [s], %t;" + OUT, "race of two writes"),
        ("ld.shared.u32 %r0, [%r31];" + OUT, "read of shared memory that nobody wrote"),
        ("ld.global.u32 %r1, [%rd0]; st.global.u32 [%rd0], %t;", "race of a write and a read"),
        ("ld.global.nc.u32 %r1, [%rd0]; bar.sync 0; st.global.u32 [%rd0], %t;",
         "write to memory that the kernel reads through the read-only path"),
        ("mad.wide.u32 %rl1, %t, 4, %rd0; st.global.u32 [%rl1], %t; bar.sync 0;"
         "ld.global.nc.u32 %r1, [%rd0];", "read through the read-only path"),
        ("atom.shared.add.u32 %r0, [s], 1;", "read of shared memory that nobody wrote"),
    ],
)  # fmt: skip
def test_what_nothing_orders_is_reported(code, report):
    with pytest.raises(PtxError, match=report):
        run(code)


@pytest.mark.parametrize(
    "code",
    [
        SWAP_IN_WARP.format("bar.warp.sync -1;"),
        SWAP_IN_WARP.format("bar.sync 0;"),
        "setp.eq.u32 %p0, %t, 0; @%p0 st.shared.u32 [s], 0; bar.sync 0;"
        "atom.shared.add.u32 %r0, [s], 1; bar.sync 0; ld.shared.u32 %r0, [s];" + OUT,
        "st.volatile.global.u32 [%rd0], 3; ld.relaxed.gpu.global.u32 %r0, [%rd0];",
        "st.shared.u32 [%r31], %t; ld.shared.u32 %r0, [%r31];" + OUT,
    ],
)
def test_what_is_ordered_is_not_reported(code):
    run(code)


def test_a_warp_barrier_orders_only_its_members():
    code = (
        """st.shared.u32 [%r31], %t; setp.lt.u32 %p0, %lane, 16;
    @%p0 bar.warp.sync 0xffff; @!%p0 bar.warp.sync 0xffff0000;
    xor.b32 %r1, %t, {}; mad.lo.u32 %r2, %r1, 4, %r30; ld.shared.u32 %r0, [%r2];"""
        + OUT
    )
    assert (run(code.format(1)) == np.arange(64) ^ 1).all()
    with pytest.raises(PtxError, match="race of a read"):
        run(code.format(16))


def test_a_barrier_of_some_warps_orders_only_these():
    code = (
        """st.shared.u32 [%r31], %t; setp.lt.u32 %p0, %t, 64;
    @%p0 bar.sync 1, 64; @!%p0 bar.sync 2, 64;
    xor.b32 %r1, %t, {}; mad.lo.u32 %r2, %r1, 4, %r30; ld.shared.u32 %r0, [%r2];"""
        + OUT
    )
    assert (run(code.format(32), 128) == np.arange(128) ^ 32).all()
    with pytest.raises(PtxError, match=r"race of a read|nobody wrote|write and a read"):
        run(code.format(64), 128)


def test_two_blocks_race():
    out = np.zeros(1, np.uint32)
    with pytest.raises(PtxError, match=r"race of two writes: thread 0 .* of block 0"):
        launch("st.global.u32 [%rd0], %t;", out, grid=2, block=1, settings="check=1")
    launch("red.global.add.u32 [%rd0], 1;", out, grid=2, block=1, settings="check=1")
    assert out[0] == 2


@pytest.mark.parametrize("settings", SCHEDULES)
def test_producers_arrive_and_consumers_wait(settings):
    code = (
        """setp.lt.u32 %p0, %t, 32; mov.u32 %r0, 0; @%p0 bra produce;
    bar.sync 1, 64;
    sub.u32 %r1, %t, 32; mad.lo.u32 %r2, %r1, 4, %r30; ld.shared.u32 %r0, [%r2]; bra end;
    produce: add.u32 %r3, %t, 7; st.shared.u32 [%r31], %r3; bar.arrive 1, 64;
    end:"""
        + OUT
    )
    got = run(code, 64, f"check=1 {settings}")
    assert (got[32:] == np.arange(32) + 7).all()
    with pytest.raises(PtxError, match=r"nobody wrote|race of a"):
        run(code.replace("bar.arrive 1, 64;", "bar.arrive 2, 64;").replace("bar.sync 1, 64;", ""))


@pytest.mark.parametrize("settings", SCHEDULES[:4])
def test_barriers_that_reduce(settings):
    head = "rem.u32 %r1, %t, 3; setp.eq.u32 %p0, %r1, 0;"
    got = run(head + "bar.red.popc.u32 %r0, 0, %p0;" + OUT, 96, settings)
    assert (got == 32).all()
    got = run(head + "barrier.cta.red.popc.aligned.u32 %r0, 0, 96, !%p0;" + OUT, 96, settings)
    assert (got == 64).all()
    for name, want in (("and", 0), ("or", 1)):
        code = f"bar.red.{name}.pred %p1, 0, %p0; selp.u32 %r0, 1, 0, %p1;" + OUT
        assert (run(head + code, 96, settings) == want).all()
    code = "setp.ne.u32 %p0, %t, 2000; bar.red.and.pred %p1, 0, %p0;"
    assert (run(code + "selp.u32 %r0, 1, 0, %p1;" + OUT, 96, settings) == 1).all()


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 0;", "not all threads reach; warp 0 at"),
        ("setp.lt.u32 %p0, %t, 32; @%p0 ret; bar.sync 0;", "warp 0 has returned"),
        ("setp.lt.u32 %p0, %t, 16; @%p0 ret; bar.sync 0;", "lanes of the warp have returned"),
        ("setp.lt.u32 %p0, %t, 16; @%p0 bar.sync 0;", "guard is false in some lanes"),
        ("bar.sync 16;", "barrier 16 of 16"),
        ("bar.sync 0, 48;", "48 threads are no whole warps"),
        ("setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 0, 64; @!%p0 bar.sync 0, 96;",
         "barrier 0: of 64 threads, and of 96"),
    ],
)  # fmt: skip
def test_barriers_that_cannot_be(code, report):
    with pytest.raises(PtxError, match=report):
        run(code)


def test_fences_are_known():
    run(
        "membar.gl; membar.sys; fence.sc.gpu; fence.acq_rel.cta; fence.acq_rel.sys; mov.u32 %r0, 1;"
    )
    with pytest.raises(PtxError, match=r"unknown opcode fence\.proxy\.async"):
        run("fence.proxy.async;")


# --- cp.async

COPY = (
    """
mad.wide.u32 %rl1, %t, 16, %rd1; mad.lo.u32 %r1, %t, 16, %r30;
cp.async.cg.shared.global [%r1], [%rl1], 16;
cp.async.commit_group;
cp.async.ca.shared.global [%r1+512], [%rl1], 8, 4;
cp.async.commit_group;
{}
ld.shared.u32 %r0, [%r1+4]; ld.shared.u32 %r2, [%r1+512]; ld.shared.u32 %r3, [%r1+516];
mad.lo.u32 %r0, %r2, 1000, %r0; mad.lo.u32 %r0, %r3, 1000000, %r0;
"""
    + OUT
)
SOURCE = np.arange(128, dtype=np.uint32)
COPIED = np.arange(32) * 4 * 1000 + np.arange(32) * 4 + 1


@pytest.mark.parametrize("settings", SCHEDULES)
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_copies_land(wait, settings):
    got = run(COPY.format(wait), 32, f"check=1 {settings}", SOURCE)
    assert (got == COPIED).all()


def test_a_group_that_was_not_waited_for():
    with pytest.raises(PtxError, match="shared memory that nobody wrote"):
        run(COPY.format("cp.async.wait_group 1;"), 32, "check=1", SOURCE)
    late = run(COPY.format("cp.async.wait_group 1;"), 32, "async=late", SOURCE)
    assert (late != COPIED).all()
    early = run(COPY.format("cp.async.wait_group 1;"), 32, "async=early", SOURCE)
    assert (early == COPIED).all()
    mixed = run(COPY.format("cp.async.wait_group 1;"), 32, "async=random:1", SOURCE)
    assert (mixed == COPIED).any()
    assert (mixed != COPIED).any()


@pytest.mark.parametrize("settings", SCHEDULES)
def test_schedules_give_equal_bits(settings):
    """A sum over blocks and warps by integer atomics, and floats in an order of their own."""
    x = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    total, parts = np.zeros(1, np.uint32), np.zeros(8, np.float32)
    body = """mov.u32 %r9, %ctaid.x; mad.lo.u32 %r1, %r9, 128, %t; mad.wide.u32 %rl1, %r1, 4, %rd0;
    ld.global.f32 %f1, [%rl1]; red.global.add.u32 [%rd1], %r1;"""
    for offset in (16, 8, 4, 2, 1):
        body += f"mov.b32 %r2, %f1; shfl.sync.bfly.b32 %r3, %r2, {offset}, 31, -1;"
        body += "mov.b32 %f2, %r3; add.f32 %f1, %f1, %f2;"
    body += "shr.u32 %r4, %r1, 5; mad.wide.u32 %rl2, %r4, 4, %rd2; setp.eq.u32 %p0, %lane, 0;"
    body += "@%p0 st.global.f32 [%rl2], %f1;"
    launch(body, x, total, parts, grid=2, block=128, settings=f"check=1 {settings}")
    want = x.reshape(8, 32)
    for offset in (16, 8, 4, 2, 1):
        want = want + want[:, np.arange(32) ^ offset]
    assert (parts == want[:, 0]).all()
    assert total[0] == 255 * 128


def test_random_orders_differ():
    """The order in which blocks come, and warps take turns."""
    orders = set()
    for seed in range(4):
        out = np.zeros(1, np.uint32)
        body = """mov.u32 %r1, %ctaid.x; atom.global.exch.b32 %r2, [%rd0], %r1;"""
        launch(body, out, grid=8, block=1, settings=f"order=random:{seed}")
        orders.add(int(out[0]))
    assert len(orders) > 1


@pytest.mark.parametrize("settings", ["order=sideways", "colour=1", "check"])
def test_settings_that_are_not_known(settings):
    with pytest.raises(PtxError, match="unknown option"):
        run("mov.u32 %r0, 1;", 32, settings)


def test_warps_that_wait_by_memory():
    """One warp spins for a flag that the other sets."""
    code = (
        """setp.lt.u32 %p0, %t, 32; @!%p0 bra set;
    spin: ld.volatile.global.u32 %r1, [%rd1]; setp.eq.u32 %p1, %r1, 0; @%p1 bra spin; bra end;
    set: st.volatile.global.u32 [%rd1], 1;
    end: mov.u32 %r0, 1;"""
        + OUT
    )
    assert (run(code, 64, "", np.zeros(1, np.uint32)) == 1).all()
