# SPDX-License-Identifier: Apache-2.0
"""Sample kernels, compiled by nvcc: collectives give what CUDA's documentation says, and faults are
reported, with and without the checker.

A fault counts as found if a launch fails with a report or any schedule gives a wrong result.
"""

import re
from functools import cache

import numpy as np
import pytest
import torch
from kernel_library import HERE, SCHEDULES
from softgpu.kernels import only
from source_faults import NONE, choose_fault, compile_ptx

from softgpu.ptx import PtxError, run_ptx

N = 128  # threads of the planted kernel
SAMPLES = HERE / "kernels" / "samples.cu"

# In the order of the enum in kernels/samples.cu: name, what the report says without and with the
# checker. None: no report is needed, the result is wrong; "": nothing is found.
FAULTS = [
    ("none", "", ""),
    ("no_barrier_after_write", None, "race|nobody wrote"),
    ("no_barrier_before_reuse", None, "race"),
    ("no_syncwarp", "", "race"),  # a warp's lanes run side by side: only a race, not a result
    ("divergent_barrier", "barrier", "barrier"),
    ("half_never_written", None, "shared memory that nobody wrote"),
    ("divergent_shuffle", "diverged|wait", "diverged|wait"),
    ("shared_past_end", "shared memory: offset", "shared memory: offset"),
    ("global_read_past_end", "", "outside of the memory"),
    ("global_write_past_end", "", "outside of the memory"),
    ("misaligned_load", "not a multiple of 16", "not a multiple of 16"),
    ("misaligned_store", "not a multiple of 16", "not a multiple of 16"),
    ("racing_blocks", "", "race.* of block 0 .*global memory"),
    ("early_return", "diverged|barrier|returned", "diverged|barrier|returned"),
    ("null_pointer", "invalid address", "outside of the memory|invalid address"),
]


@cache
def samples(fault: int = NONE) -> str:
    return choose_fault(compile_ptx(SAMPLES.name, {SAMPLES.name: SAMPLES.read_text()}), fault)


def run_planted(fault: int, check: bool) -> tuple[str, bool]:
    """The first report of any schedule, and whether any result was wrong."""
    given = torch.arange(N + 8).float() + 1  # what lies behind the buffer is not for the kernel
    x, mirrored = given[:N], given[:N].flip(0)
    want = mirrored + mirrored.view(-1, 2).flip(1).flatten() + 2 * mirrored
    report, wrong = "", False
    for schedule in SCHEDULES:
        out, counter = torch.full((N + 8,), torch.nan)[:N], torch.zeros(1, dtype=torch.int32)
        # Addresses: an array would end at a page that faults, with or without the checker.
        arguments = [*(np.uint64(t.data_ptr()) for t in (x, out, counter)), np.uint64(0)]
        settings = f"{schedule.settings} check={int(check)}"
        try:
            with only([x, out, counter]):
                run_ptx(samples(fault), "planted", 2, N, arguments, settings=settings)
            wrong |= not (torch.equal(out, want) and counter.item() == 2)
        except PtxError as error:
            report = report or str(error)
    return report, wrong


@pytest.mark.parametrize("check", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f[0] for f in FAULTS])
def test_planted_fault(number: int, check: bool) -> None:
    expected = FAULTS[number][1 + check]
    report, wrong = run_planted(number, check)
    if expected is None:
        assert wrong
    elif expected == "":
        assert not report
        assert number or not wrong
    else:
        assert re.search(expected, report), report or "nothing is reported"


def test_reports_name_the_line() -> None:
    report, _ = run_planted([f[0] for f in FAULTS].index("no_syncwarp"), check=True)
    source = SAMPLES.read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "pairs[t ^ 1]" in text)
    assert f"samples.cu:{line}" in report


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_collectives_follow_their_definitions(schedule) -> None:
    wrong = np.zeros(2, np.int32)
    run_ptx(samples(), "collectives", 2, (48, 2), [wrong], settings=schedule.settings)
    assert wrong.tolist() == [0, 0]
