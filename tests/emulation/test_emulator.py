# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: it must give what CUDA gives, and find the faults planted in sample kernels.

A fault counts as found if a launch fails with a report or any schedule gives a wrong result.
"""

import re

import pytest
import torch
from emulib import KERNELS, SCHEDULES, LaunchError, Lib, build, sample_library
from torch import Tensor

N = 128  # threads of the planted kernel

# In the order of the enum in kernels/planted.cu: name, what the report says in the flavours fast
# and check. None: no report is needed, the result is wrong; "": nothing is found.
FAULTS = [
    ("none", "", ""),
    ("no_barrier_after_write", None, "race in shared memory"),
    ("no_barrier_before_reuse", None, "race in shared memory"),
    ("no_syncwarp", None, "race in shared memory"),
    ("divergent_barrier", "mismatched barrier|diverged|deadlock|returned", "barrier|deadlock"),
    ("half_never_written", None, "no thread of the block has written"),
    ("divergent_shuffle", "deadlock|diverged", "deadlock|diverged"),
    ("shared_past_end", "", "outside the block's shared memory"),
    ("global_read_past_end", "", "outside every buffer"),
    ("global_write_past_end", "", "outside every buffer"),
    ("misaligned_load", "__ldg of 16 bytes is misaligned", "__ldg of 16 bytes is misaligned"),
    ("misaligned_store", "__stwb of 16 bytes is misaligned", "__stwb of 16 bytes is misaligned"),
    ("racing_blocks", "", "race in global memory between blocks"),
    ("early_return", "returned|returns", "returned|returns"),
    ("null_pointer", "invalid address", "outside every buffer"),
]


@pytest.fixture(scope="module")
def planted(flavour: str) -> Lib:
    return sample_library("planted", flavour)


def _cute_sample(name: str, flavour: str) -> Lib:
    try:
        build.cutlass_include()
    except build.BuildError as error:
        pytest.skip(str(error))
    return sample_library(name, flavour, cute=True)


def _run_planted(lib: Lib, fault: int) -> tuple[str, bool]:
    """The first report of any schedule, and whether any result was wrong."""
    given = torch.arange(N + 8).float() + 1  # what lies behind the buffer is not for the kernel
    x = given[:N]
    mirrored = x.flip(0)
    want = mirrored + mirrored.view(-1, 2).flip(1).flatten() + 2 * mirrored
    report, wrong = "", False
    for schedule in SCHEDULES:
        lib.schedule(*schedule)
        out, counter = torch.full((N + 8,), float("nan"))[:N], torch.zeros(1, dtype=torch.int32)
        try:
            lib.call("sample_planted", fault, x, out, counter)
            wrong |= not (torch.equal(out, want) and counter.item() == 2)
        except LaunchError as error:
            report = report or str(error)
    lib.schedule()
    return report, wrong


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f[0] for f in FAULTS])
def test_planted_fault(planted: Lib, number: int) -> None:
    expected = FAULTS[number][2 if planted.checks else 1]
    report, wrong = _run_planted(planted, number)
    if expected is None:
        assert wrong
        return
    if expected == "":
        assert not report
        return
    assert report
    assert re.search(expected, report), report


def test_reports_name_the_line(planted: Lib) -> None:
    if not planted.checks:
        pytest.skip("only the check flavour knows lines")
    report, _ = _run_planted(planted, 3)
    source = (KERNELS / "planted.cu").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "pairs[t ^ 1]" in text)
    assert f"planted.cu:{line}" in report


def test_collectives_follow_their_definitions(flavour: str) -> None:
    lib = _cute_sample("intrin", flavour)
    for schedule in SCHEDULES:
        lib.schedule(*schedule)
        wrong = torch.zeros(1, dtype=torch.int32)
        lib.call("sample_intrin", wrong)
        assert wrong.item() == 0


# --- CuTe: mma.sync, ldmatrix and cp.async of sm_80


@pytest.fixture(scope="module")
def gemm(flavour: str) -> Lib:
    return _cute_sample("gemm", flavour)


def _gemm(lib: Lib, big: bool, fault: int, counts: list[int], n: int, k: int) -> list[Tensor]:
    """Result [P, n] and its float64 reference; rows of A are gathered."""
    g = torch.Generator().manual_seed(0)
    rows, experts = sum(counts), len(counts)
    a = torch.randn(rows, k, generator=g).bfloat16()
    b = torch.randn(experts, n, k, generator=g).bfloat16()
    row = torch.randint(0, rows, (rows,), generator=g, dtype=torch.int32)
    offset = torch.tensor([0, *counts]).cumsum(0).int()
    out = torch.full((rows, n), float("nan"))
    lib.call("sample_gemm", int(big), fault, a, row, b, offset, experts, rows, n, k, out)
    groups = row.long().split(counts)
    want = [a[i].double() @ w.double().T for i, w in zip(groups, b, strict=True)]
    return [out, torch.cat(want)]


@pytest.mark.parametrize(
    ("big", "counts", "n", "k"),
    [(True, [128], 128, 64), (False, [5, 0, 70, 33], 72, 136), (True, [100, 0, 129, 31], 200, 200)],
)
def test_gemm(gemm: Lib, big: bool, counts: list[int], n: int, k: int) -> None:
    first = None
    for schedule in SCHEDULES[:3]:
        gemm.schedule(*schedule)
        out, want = _gemm(gemm, big, 0, counts, n, k)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
        first = out if first is None else first
        assert torch.equal(out, first)


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_gemm_faults(gemm: Lib, fault: int) -> None:
    assert (
        "right" not in _outcomes(gemm, lambda: _gemm(gemm, False, fault, [5, 70, 33], 72, 136))[:1]
    )


# --- TMA, mbarrier and wgmma of sm_90


@pytest.fixture(scope="module")
def gemm90(flavour: str) -> Lib:
    return _cute_sample("gemm90", flavour)


def _gemm90(lib: Lib, fault: int, m: int, n: int, k: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=g).bfloat16(), torch.randn(n, k, generator=g).bfloat16()
    out = torch.full((m, n), float("nan"))
    lib.call("sample_gemm90", fault, a, b, m, n, k, out)
    return [out, a.double() @ b.double().T]


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 320), (100, 200, 72)])
def test_gemm90(gemm90: Lib, m: int, n: int, k: int) -> None:
    first = None
    for schedule in SCHEDULES[:4]:
        gemm90.schedule(*schedule)
        out, want = _gemm90(gemm90, 0, m, n, k)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-4)
        first = out if first is None else first
        assert torch.equal(out, first)


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_gemm90_faults(gemm90: Lib, fault: int) -> None:
    outcomes = _outcomes(gemm90, lambda: _gemm90(gemm90, fault, 128, 128, 512))
    assert set(outcomes) != {"right"}


def _outcomes(lib: Lib, run) -> list[str]:
    """ "right", "wrong" or the report, for every schedule."""
    outcomes = []
    for schedule in SCHEDULES:
        lib.schedule(*schedule)
        try:
            out, want = run()
            right = torch.allclose(out.double(), want, rtol=1e-5, atol=1e-3)
            outcomes.append("right" if right else "wrong")
        except LaunchError as error:
            outcomes.append(str(error))
    lib.schedule()
    return outcomes
