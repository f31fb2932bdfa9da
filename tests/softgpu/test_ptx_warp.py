# SPDX-License-Identifier: Apache-2.0
"""Exchanges between lanes, masks of members, divergence and convergence."""

import numpy as np
import pytest
from ptx_kernels import launch, needs_build, same_bits

from softgpu.ptx import PtxError

pytestmark = needs_build

LANES = np.arange(32)
X = np.random.default_rng(0).integers(0, 2**32, 32).astype(np.uint32)


def warp(code: str, *inputs: np.ndarray, block: int = 32, settings: str = "") -> np.ndarray:
    """Executes lines in which %r1, %r2, ... hold the inputs of the lane and %r0 is the result."""
    out = np.zeros(block, np.uint32)
    body = "mov.u32 %r0, 0;\n"
    for n, _ in enumerate(inputs):
        body += f"mad.wide.u32 %rl0, %t, 4, %rd{n}; ld.global.u32 %r{n + 1}, [%rl0];\n"
    body += code
    body += f"\nmad.wide.u32 %rl0, %t, 4, %rd{len(inputs)}; st.global.u32 [%rl0], %r0;"
    launch(body, *inputs, out, block=block, settings=settings)
    return out


def shuffled(kind: str, b: int, c: int, lane: int) -> tuple[int, bool]:
    """The manual's pseudo-code: the lane that is read, and the predicate."""
    segment, clamp = c >> 8 & 31, c & 31
    first = lane & segment
    last = first | (clamp & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[
        kind
    ]
    valid = source >= last if kind == "up" else source <= last
    return (source if valid else lane), valid


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
def test_shuffles(kind, width):
    c = (32 - width) << 8 | (0 if kind == "up" else 31)
    for b in (0, 1, 3, 7, 16, 31):
        code = f"shfl.sync.{kind}.b32 %r0|%p0, %r1, {b}, {c}, -1;"
        want = [shuffled(kind, b, c, lane) for lane in range(32)]
        same_bits(warp(code, X), X[[source for source, _ in want]], (kind, b))
        flags = warp(code + "selp.u32 %r0, 1, 0, %p0;", X)
        assert flags.tolist() == [int(valid) for _, valid in want], (kind, b)


def test_a_shuffle_reads_the_lane_that_each_names():
    b = np.random.default_rng(1).integers(0, 64, 32).astype(np.uint32)
    same_bits(warp("shfl.sync.idx.b32 %r0, %r1, %r2, 31, -1;", X, b), X[b % 32])
    up = warp("shfl.sync.idx.b32 %r0|_, %r1, %r2, 31, -1;", X, b)
    same_bits(up, X[b % 32])


def test_members_of_a_mask_exchange_without_the_others():
    code = """setp.lt.u32 %p0, %lane, 8;
    @%p0 shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xff;"""
    same_bits(warp(code, X), np.where(LANES < 8, X[LANES ^ 1], 0))


def test_a_lane_that_takes_no_part_gives_nothing():
    code = """setp.lt.u32 %p0, %lane, 8;
    @%p0 shfl.sync.bfly.b32 %r0, %r1, 8, 31, 0xff;"""
    assert (warp(code, X)[:8] != X[8:16]).all()


P = LANES % 3 == 0


@pytest.mark.parametrize("members", [0xFFFFFFFF, 0x0000FFFF, 0x00000001])
def test_votes(members):
    inside = members >> LANES & 1 == 1
    guard = f"mov.u32 %r5, {members}; shr.u32 %r6, %r5, %lane; and.b32 %r6, %r6, 1;"
    guard += "setp.ne.u32 %p5, %r6, 0; setp.ne.u32 %p0, %r1, 0;"
    for values in (P, P | True, P & False):
        ballot = sum(1 << n for n in range(32) if values[n] and inside[n])
        inverse = sum(1 << n for n in range(32) if not values[n] and inside[n])
        x = values.astype(np.uint32)
        got = warp(guard + "@%p5 vote.sync.ballot.b32 %r0, %p0, %r5;", x)
        same_bits(got, np.where(inside, ballot, 0))
        got = warp(guard + "@%p5 vote.sync.ballot.b32 %r0, !%p0, %r5;", x)
        same_bits(got, np.where(inside, inverse, 0))
        votes = {
            "any": values[inside].any(),
            "all": values[inside].all(),
            "uni": values[inside].all() or not values[inside].any(),
        }
        for kind, want in votes.items():
            code = f"setp.ne.u32 %p1, 0, 0; @%p5 vote.sync.{kind}.pred %p1, %p0, %r5;"
            got = warp(guard + code + "selp.u32 %r0, 1, 0, %p1;", x)
            same_bits(got, inside * want, kind)
        none = warp(guard + "@%p5 vote.sync.any.pred %p1, !%p0, %r5; selp.u32 %r0, 1, 0, %p1;", x)
        assert (none[inside] == (not values[inside].all())).all()


def test_match():
    x = (X % 5).astype(np.uint32)
    want = [sum(1 << m for m in range(32) if x[m] == x[n]) for n in range(32)]
    assert warp("match.any.sync.b32 %r0, %r1, -1;", x).tolist() == want
    code = "cvt.u64.u32 %rl1, %r1; shl.b64 %rl1, %rl1, 32; match.any.sync.b64 %r0, %rl1, -1;"
    assert warp(code, x).tolist() == want
    for values, same in ((x, False), (x * 0 + 7, True)):
        code = "match.all.sync.b32 %r0|%p0, %r1, -1;"
        assert (warp(code, values) == (0xFFFFFFFF if same else 0)).all()
        assert (warp(code + "selp.u32 %r0, 1, 0, %p0;", values) == same).all()
    code = "mov.b64 %rl1, {%r1, %r1}; match.all.sync.b64 %r0, %rl1, -1;"
    assert (warp(code, x * 0) == 0xFFFFFFFF).all()


REDUX = {
    "add.u32": lambda x: int(x.astype(np.uint64).sum()) % 2**32,
    "add.s32": lambda x: int(x.astype(np.uint64).sum()) % 2**32,
    "min.u32": lambda x: int(x.min()),
    "max.u32": lambda x: int(x.max()),
    "min.s32": lambda x: int(x.view(np.int32).min()) % 2**32,
    "max.s32": lambda x: int(x.view(np.int32).max()) % 2**32,
    "and.b32": lambda x: int(np.bitwise_and.reduce(x)),
    "or.b32": lambda x: int(np.bitwise_or.reduce(x)),
    "xor.b32": lambda x: int(np.bitwise_xor.reduce(x)),
}


@pytest.mark.parametrize("name", REDUX)
def test_redux(name):
    for x in (X, X | 0x80000000, X >> 1, np.roll(X, 5) & 0xFFFF00FF):
        assert (warp(f"redux.sync.{name} %r0, %r1, -1;", x) == REDUX[name](x)).all()
    half = """setp.lt.u32 %p0, %lane, 16; selp.b32 %r5, 0xffff, 0xffff0000, %p0;"""
    code = half + f"@%p0 redux.sync.{name} %r0, %r1, %r5; @!%p0 redux.sync.{name} %r0, %r1, %r5;"
    want = np.where(LANES < 16, REDUX[name](X[:16]), REDUX[name](X[16:]))
    same_bits(warp(code, X), want)


def test_elect_and_activemask():
    code = """elect.sync %r0|%p0, -1; selp.u32 %r1, 100, 0, %p0; add.u32 %r0, %r0, %r1;"""
    got = warp(code, X)
    assert got[0] == 100
    assert (got[1:] == 0).all()
    code = "setp.gt.u32 %p1, %lane, 4; @%p1 bra L; bra D; L: activemask.b32 %r0; D:"
    assert (warp(code, X) == np.where(LANES > 4, 0xFFFFFFFF << 5 & 0xFFFFFFFF, 0)).all()


def test_special_registers():
    for name, want in {
        "%lanemask_eq": 1 << LANES,
        "%lanemask_lt": (1 << LANES) - 1,
        "%lanemask_le": (2 << LANES) - 1,
        "%lanemask_gt": 0xFFFFFFFF & ~((2 << LANES) - 1),
        "%lanemask_ge": 0xFFFFFFFF & ~((1 << LANES) - 1),
        "%laneid": LANES,
        "%warpid": 0 * LANES,
        "%nwarpid": 0 * LANES + 1,
        "%smid": 0 * LANES,
        "%nsmid": 0 * LANES + 132,
        "%ntid.x": 0 * LANES + 32,
        "%nctaid.x": 0 * LANES + 1,
        "%cluster_nctarank": 0 * LANES + 1,
        "%cluster_ctarank": 0 * LANES,
    }.items():
        assert (warp(f"mov.u32 %r0, {name};") == want).all(), name
    with pytest.raises(PtxError, match=r"unknown operand %pm0"):
        warp("mov.u32 %r0, %pm0;")


def test_clocks_go_forward():
    for size, name in (("u32", "%clock"), ("u64", "%clock64"), ("u64", "%globaltimer")):
        register = "%rl" if size == "u64" else "%r"
        code = f"mov.{size} {register}4, {name}; nanosleep.u32 20; mov.{size} {register}5, {name};"
        code += f"setp.gt.{size} %p0, {register}5, {register}4; selp.u32 %r0, 1, 0, %p0;"
        assert (warp(code) == 1).all()
    assert (warp("mov.u32 %r0, %clock_hi;") == 0).all()


# --- divergence

LOOP = """
mov.u32 %r2, %lane;
again: setp.eq.u32 %p0, %r2, 0;
@%p0 bra done;
add.u32 %r0, %r0, %r1;
sub.u32 %r2, %r2, 1;
bra again;
done:
"""


def test_lanes_leave_a_loop_one_by_one_and_meet_again():
    same_bits(warp(LOOP, X), X * LANES.astype(np.uint32))
    together = LOOP + "redux.sync.add.u32 %r0, 1, -1;"
    assert (warp(together, X) == 32).all()
    counted = LOOP + "activemask.b32 %r0;"
    assert (warp(counted, X) == 0xFFFFFFFF).all()


def test_both_sides_of_a_branch():
    code = """setp.lt.u32 %p0, %r1, 0x80000000; @%p0 bra then;
    mul.lo.u32 %r0, %r1, 3; bra.uni join;
    then: not.b32 %r0, %r1;
    join: xor.b32 %r0, %r0, 1;"""
    want = np.where(X < 0x80000000, ~X, (X.astype(np.uint64) * 3).astype(np.uint32)) ^ 1
    same_bits(warp(code, X), want)


def test_a_jump_table():
    code = """rem.u32 %r2, %r1, 4; mov.u32 %r0, 9;
    targets: .branchtargets a, b, c, a;
    brx.idx %r2, targets;
    a: mov.u32 %r0, 10; bra end;
    b: mov.u32 %r0, 11; bra end;
    c: mov.u32 %r0, 12;
    end: redux.sync.add.u32 %r3, 1, -1; mad.lo.u32 %r0, %r3, 100, %r0;"""
    want = np.array([10, 11, 12, 10])[X % 4] + 3200
    same_bits(warp(code, X), want.astype(np.uint32))
    with pytest.raises(PtxError, match=r"brx\.idx: index 9 has no target"):
        warp(code.replace("rem.u32 %r2, %r1, 4;", "mov.u32 %r2, 9;"), X)


def test_lanes_that_return_early_are_gone():
    code = "setp.ge.u32 %p0, %lane, 20; @%p0 {}; activemask.b32 %r0;"
    for leave in ("exit", "ret"):
        got = warp(code.format(leave), X)
        same_bits(got, np.where(LANES < 20, (1 << 20) - 1, 0))


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("setp.gt.u32 %p0, %lane, 3; @%p0 ret; shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;",
         "names lanes that have returned"),
        ("shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xfffffffe;", "not in its own mask"),
        ("shfl.sync.bfly.b32 %r0, %r1, 1, 31, %r1;", "lanes name different members"),
        ("setp.gt.u32 %p0, %lane, 3; @%p0 redux.sync.add.u32 %r0, %r1, -1;",
         "collective whose guard is false in some lanes"),
        ("setp.gt.u32 %p0, %lane, 3; @%p0 bra other; bar.warp.sync -1; bra end;"
         "other: redux.sync.add.u32 %r0, %r1, -1; end:", "lanes wait for each other"),
        ("trap;", "trap"),
        ("brkpt;", "brkpt"),
    ],
)  # fmt: skip
def test_faults_are_reported(code, report):
    with pytest.raises(
        PtxError, match=rf"kernel: block 0,0: .*{report}.* \[warp 0, lanes .*PTX line"
    ):
        warp(code, X)


def test_a_partial_warp_has_no_more_lanes():
    assert (warp("activemask.b32 %r0;", block=20) == (1 << 20) - 1).all()
    with pytest.raises(PtxError, match="returned, or never were"):
        warp("bar.warp.sync -1;", block=20)


def test_lanes_of_a_warp_may_wait_for_each_other():
    """A lock that a lane holds while others of its warp spin for it."""
    code = """
    mov.u32 %r3, 0;
    try: atom.global.cas.b32 %r4, [%rd0], 0, 1;
    setp.ne.u32 %p0, %r4, 0; @%p0 bra try;
    ld.volatile.global.u32 %r5, [%rd0+4]; add.u32 %r5, %r5, 1;
    st.volatile.global.u32 [%rd0+4], %r5;
    membar.gl;
    atom.global.exch.b32 %r4, [%rd0], 0;
    """
    state = np.zeros(2, np.uint32)
    launch(code, state, block=64)
    assert state.tolist() == [0, 64]
