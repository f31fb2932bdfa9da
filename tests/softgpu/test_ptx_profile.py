# SPDX-License-Identifier: Apache-2.0
"""The profile's counts on kernels whose answers are known, and the files of both reports."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from ptx_kernels import HEAD, launch, needs_build

from softgpu import coverage, profile, ptx

pytestmark = needs_build

MANY = np.zeros(32 * 1024, np.uint32)


def counts(body: str, **kwargs) -> dict:
    return launch(body, MANY, settings="profile=1", **kwargs)["profile"]


LOAD = "mad.wide.u32 %rl0, %t, {step}, %rd0; ld.global.{kind}, [%rl0+{offset}];"
ONE, TWO, FOUR = "u32 %r0", "v2.u32 {%r0, %r1}", "v4.u32 {%r0, %r1, %r2, %r3}"


@pytest.mark.parametrize(
    ("kind", "step", "offset", "sectors", "size", "ideal"),
    [
        (ONE, 4, 0, 4, 128, 4),  # coalesced
        (ONE, 4, 4, 5, 128, 4),  # shifted by an element
        (ONE, 8, 0, 8, 128, 4),  # every other
        (ONE, 32, 0, 32, 128, 4),  # a sector each
        (ONE, 256, 0, 32, 128, 4),
        (ONE, 0, 0, 1, 4, 1),  # all the same
        ("u8 %rs0", 1, 0, 1, 32, 1),
        (TWO, 8, 0, 8, 256, 8),
        (FOUR, 16, 0, 16, 512, 16),
        (FOUR, 32, 0, 32, 512, 16),
    ],
)
def test_sectors(kind, step, offset, sectors, size, ideal):
    p = counts(LOAD.format(step=step, kind=kind, offset=offset))
    want = {"requests": 1, "sectors": sectors, "ideal": ideal, "bytes": size}
    assert p["global_load"] == want
    assert p["global_store"] == {"requests": 0, "sectors": 0, "ideal": 0, "bytes": 0}
    width, registers = kind.split(" ", 1)
    store = f"mad.wide.u32 %rl0, %t, {step}, %rd0; st.global.{width} [%rl0+{offset}], {registers};"
    assert counts(store)["global_store"] == want


def test_lanes_that_are_off_ask_for_nothing():
    body = "setp.lt.u32 %p0, %t, 8; mad.wide.u32 %rl0, %t, 4, %rd0; @%p0 ld.global.u32 %r0, [%rl0];"
    p = counts(body)
    assert p["global_load"] == {"requests": 1, "sectors": 1, "ideal": 1, "bytes": 32}


@pytest.mark.parametrize(
    ("kind", "step", "wavefronts", "ideal"),
    [
        (ONE, 4, 1, 1),
        (ONE, 0, 1, 1),  # a broadcast
        (ONE, 8, 2, 1),  # two words per bank
        (ONE, 16, 4, 1),
        (ONE, 128, 32, 1),  # all in one bank
        (ONE, 132, 1, 1),  # a padded column
        ("u16 %rs0", 2, 1, 1),  # two lanes per word
        (TWO, 8, 2, 2),  # half a warp at a time
        (TWO, 16, 4, 2),
        (FOUR, 16, 4, 4),  # a quarter
        (FOUR, 32, 8, 4),
        (FOUR, 128, 32, 4),
        (FOUR, 144, 4, 4),  # rows of 128 bytes and a pad of 16
    ],
)
def test_bank_conflicts(kind, step, wavefronts, ideal):
    width, registers = kind.split(" ", 1)
    body = f".shared .align 16 .b8 s[8192]; mov.u32 %r9, s; mad.lo.u32 %r8, %t, {step}, %r9;"
    load = counts(body + f"ld.shared.{width} {registers}, [%r8];")["shared_load"]
    assert (load["requests"], load["wavefronts"], load["ideal"]) == (1, wavefronts, ideal)
    store = counts(body + f"st.shared.{width} [%r8], {registers};")["shared_store"]
    assert (store["requests"], store["wavefronts"], store["ideal"]) == (1, wavefronts, ideal)


@pytest.mark.parametrize(("step", "wavefronts"), [(16, 4), (128, 32), (144, 4)])
def test_bank_conflicts_of_ldmatrix(step, wavefronts):
    body = f".shared .align 16 .b8 s[8192]; mov.u32 %r9, s; mad.lo.u32 %r8, %t, {step}, %r9;"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%r8];"
    load = counts(body)["shared_load"]
    assert load == {"requests": 1, "wavefronts": wavefronts, "ideal": 4, "bytes": 512}


def test_async_copies_are_loads_and_stores():
    body = """.shared .align 16 .b8 s[512]; mov.u32 %r9, s; mad.lo.u32 %r8, %t, 16, %r9;
    mad.wide.u32 %rl0, %t, 16, %rd0; cp.async.cg.shared.global [%r8], [%rl0], 16;
    cp.async.wait_all;"""
    p = counts(body)
    assert p["global_load"]["sectors"] == 16
    assert p["shared_store"]["wavefronts"] == 4
    assert p["instructions"]["copy_async"] == 2


def test_atomics():
    body = ".shared .u32 s; red.global.add.u32 [%rd0], 1; st.shared.u32 [s], 0;"
    p = counts(body + "atom.shared.add.u32 %r0, [s], 1; atom.add.u32 %r0, [%rd0], 1;")
    assert p["global_atomic"]["requests"] == 2
    assert p["global_atomic"]["sectors"] == 2
    assert p["shared_atomic"]["requests"] == 1
    assert p["instructions"]["atomic"] == 3


CLASSES = {
    "integer": "add.s32 %r0, %r1, %r2; shl.b32 %r0, %r1, 2; mul.wide.u32 %rl1, %r0, %r1;",
    "float32": "add.f32 %f0, %f1, %f2; fma.rn.f32 %f0, %f1, %f2, %f3;",
    "float64": "mul.f64 %fd0, %fd1, %fd2;",
    "half": "add.f16 %rs0, %rs1, %rs2; fma.rn.bf16x2 %r0, %r1, %r2, %r3;",
    "special": "ex2.approx.f32 %f0, %f1; rsqrt.approx.f32 %f0, %f1; rcp.rn.f32 %f0, %f1;",
    "conversion": "cvt.rn.f32.s32 %f0, %r0;",
    "compare": "setp.lt.s32 %p0, %r0, %r1; selp.b32 %r0, %r1, %r2, %p0;",
    "exchange": "shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1; vote.sync.ballot.b32 %r0, %p0, -1;",
    "barrier": "bar.sync 0; membar.gl; bar.warp.sync -1;",
    "branch": "bra next; next: bra.uni last; last:",
    "load_local": ".local .b32 x; ld.local.u32 %r0, [x];",
    "store_local": ".local .b32 x; st.local.u32 [x], %r0;",
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    body = CLASSES[name]
    n = len([s for s in body.split(";") if s.strip() and not s.strip().startswith((".", "last:"))])
    base = counts("")["instructions"]
    got = counts(body)["instructions"]
    difference = {k: got[k] - base.get(k, 0) for k in got if got[k] != base.get(k, 0)}
    assert difference == {name: n}


def test_tensor_flops_and_lanes():
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r0, %r1, %r2, %r3},"
    mma += "{%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3};"
    p = counts(mma, grid=3, block=64)
    assert p["tensor_flops"] == 6 * 2 * 16 * 8 * 16
    assert (p["launches"], p["blocks"], p["warps"]) == (1, 3, 6)
    assert p["instructions"]["tensor"] == 6
    base = counts("")
    assert base["lanes"] == 32 * base["issued"]
    half = counts("setp.lt.u32 %p0, %t, 16; @%p0 add.u32 %r0, %r0, 1;")
    assert half["issued"] == base["issued"] + 2
    assert half["lanes"] == base["lanes"] + 32 + 16
    false = counts("setp.gt.u32 %p0, %t, 99; @%p0 add.u32 %r0, %r0, 1;")
    assert false["lanes"] == base["lanes"] + 32


def test_nothing_is_counted_without_the_setting():
    p = launch("ld.global.u32 %r0, [%rd0];", MANY)["profile"]
    assert p["issued"] == 0
    assert p["global_load"]["requests"] == 0


# --- files

PROGRAM = """
import numpy as np, sys
sys.path.insert(0, {path!r})
from softgpu import ptx
text = {text!r}
out = np.zeros(64, np.uint32)
for _ in range(int(sys.argv[1])):
    ptx.run_ptx(text, "_Z4fillILi2EEvPj", 2, 32, [out, np.uint32(int(sys.argv[2]))], 0, "profile=1")
"""
FILL = (
    HEAD
    + """
.file 1 "/somewhere/fill.cu"
.visible .entry _Z4fillILi2EEvPj(.param .u64 out, .param .u32 value)
{
.reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<3>;
.loc 1 7 3
ld.param.u64 %rd0, [out];
ld.param.u32 %r0, [value];
setp.eq.s32 %p0, %r0, 0;
@%p0 bra ZERO;
.loc 1 9 1
st.global.u32 [%rd0], %r0;
ret;
ZERO:
.loc 1 11 1
st.global.u32 [%rd0+4], 5;
ret;
}
"""
)


def reports(tmp_path, *runs: tuple[int, int]):
    files = {v: tmp_path / v for v in ("SOFTGPU_PROFILE", "SOFTGPU_COVERAGE")}
    path = os.path.dirname(os.path.dirname(ptx.__file__))
    program = PROGRAM.format(path=path, text=FILL)
    environment = {**os.environ, **{v: str(f) for v, f in files.items()}}
    for times, value in runs:
        command = [sys.executable, "-c", program, str(times), str(value)]
        subprocess.run(command, env=environment, check=True)
    return files["SOFTGPU_PROFILE"], files["SOFTGPU_COVERAGE"]


def test_files_of_several_processes(tmp_path):
    profile_file, coverage_file = reports(tmp_path, (2, 1), (1, 3))
    (kernel,) = profile.load([profile_file]).values()
    assert kernel["launches"] == 3
    assert kernel["blocks"] == 6
    assert kernel["instructions"] == {
        "compare": 6, "load_param": 12, "store_global": 6, "branch": 12,
    }  # fmt: skip
    (covered,) = coverage.load([coverage_file]).values()
    assert (covered.kernel, covered.architecture) == ("_Z4fillILi2EEvPj", "sm_90a")
    assert (covered.total, covered.executed, covered.launches) == (8, 6, 3)
    missed = [(i.index, i.source, i.text) for i in covered.missed.values()]
    assert missed == [(6, "fill.cu:11", "st.global.u32 [%rd0+4], 5"), (7, "fill.cu:11", "ret")]
    lines = FILL.splitlines()
    assert all(i.text in lines[i.ptx_line - 1] for i in covered.missed.values())
    # The other branch, by another process.
    reports(tmp_path, (1, 0))
    (covered,) = coverage.load([coverage_file]).values()
    assert covered.missed == {}


def test_inventory():
    (kernel,) = coverage.inventory(FILL).values()
    assert (kernel.total, kernel.executed) == (8, 0)
    with pytest.raises(ptx.PtxError, match="unknown opcode frob"):
        coverage.inventory(FILL.replace("ret;", "frob;", 1))


def test_the_report_is_the_same_each_time(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = (reports(tmp_path / folder, (2, 1))[0] for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    command = [sys.executable, "-m", "softgpu.profile", str(first)]
    path = os.path.dirname(os.path.dirname(ptx.__file__))
    environment = {**os.environ, "PYTHONPATH": path}
    table = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    head, row = table.stdout.splitlines()
    assert head.split()[0] == "launches"
    assert row.endswith("fill<2> (sm_90a)")
    full = subprocess.run(
        [*command, "--json", "--top", "1"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    (kernel,) = json.loads(full.stdout)
    assert kernel["launches"] == 2


def test_names():
    assert profile.demangled("_Z4fillILi2EEvPj") == "fill<2>"
    assert profile.demangled("_ZN3foo12_GLOBAL__N_13barEv") == "foo::bar"
    assert profile.demangled("kernel") == "kernel"
