# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the pipelined products, one at a time: the tests beside must be able to fail.

A fault is an edit of the text of a kernel and of its headers under device/gemm. Each edited copy
becomes a namespace of one source, in which CuTe is compiled once: bfloat16, one tile, check
flavour. A fault counts as found if a launch fails with a report or any schedule gives a wrong
result.
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulib import SCHEDULES, LaunchError, Lib, build, with_headers
from gemm_launchers import TILES, GemmLaunchers, Segment

ROWS, WGRAD = "cuda/grouped_mm.cu", "cuda/wgrad.cu"
LAUNCHERS = {ROWS: ("grouped_mm", "GroupedMmArgs"), WGRAD: ("grouped_wgrad", "GroupedWgradArgs")}
GEMM_HEADER = re.compile(r'#include "(cuda/device/gemm/\w+\.cuh)"\n')
COMMON = """
#include <cute/tensor.hpp>
#include <algorithm>
#include <type_traits>
#include "cuda/device/portable.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/device/warp.cuh"
#include "unipool/experts.h"
"""


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `source` with its headers in place."""

    name: str
    source: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.name


BARRIER = "__syncthreads();"
NEXT_TILE = f"cp_async_wait<kStages - 2>();\n        {BARRIER}"
STORE_TILE = f"const Output output{{smem}};\n  {BARRIER}"
STORED = f"  }}\n  {BARRIER}\n}}\n\n}}  // namespace"
EXISTS = "exists ? contiguous_ : 0"
PREDICATE = "if (row < rows && column < columns) f("
FAULTS = [
    Fault("missing_wait", ROWS, NEXT_TILE, BARRIER),
    Fault("wait_for_too_few", ROWS, NEXT_TILE, NEXT_TILE.replace("- 2", "- 1")),
    Fault("missing_barrier", ROWS, NEXT_TILE, NEXT_TILE.removesuffix(BARRIER)),
    Fault("wrong_stage_written", ROWS, "load_a.load(write);", "load_a.load(read);"),
    Fault("wrong_stage_read", ROWS, "fetch(block + 1, read);", "fetch(block + 1, write);"),
    Fault("wrong_swizzle", ROWS, "Layout{}(line, column, 0) :", "line * kDepth + column :"),
    Fault("no_row_predicate", ROWS, EXISTS, "contiguous_"),
    Fault("no_end_of_k", ROWS, "contiguous_) -= Operand::kDepth;", "contiguous_) -= 0;"),
    Fault("no_store_predicate", ROWS, PREDICATE, "if (column < columns) f("),
    Fault("stale_tail", ROWS, "group + 1) : rows_", "group + 1) : __ldg(offsets_ + group)"),
    Fault("tail_multiplied", ROWS, "tail ? 0 : ceil_div", "tail ? 1 : ceil_div"),
    Fault("no_barrier_before_the_store", ROWS, STORE_TILE, STORE_TILE.removesuffix(BARRIER)),
    Fault("no_barrier_after_the_store", ROWS, STORED, STORED.replace(BARRIER, "")),
    Fault("row_of_another_expert", WGRAD, EXISTS, "contiguous_"),
    Fault("table_not_advanced", WGRAD, "table += Operand::kDepth * stride;", ";"),
    Fault("segments_on_each_other", WGRAD, "experts + e] = count;", "experts + e] = 0;"),
    Fault("stale_expert", WGRAD, "if (depth == 0 && p.add) return;", "if (depth == 0) return;"),
]


# --- what is run; each returns whether all is right


def _grouped_mm(ops: GemmLaunchers) -> bool:
    """Several tiles a block, more k tiles than stages, an end within a tile in every dimension."""
    g = torch.Generator().manual_seed(0)
    counts = (70, 0, 65)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    a = torch.randn(137, 328, generator=g).bfloat16()
    b = torch.randn(3, 264, 328, generator=g).bfloat16()
    a[135:] = torch.nan
    want = torch.zeros(137, 264)
    for e in range(3):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        want[rows] = a[rows].float() @ b[e].float().T
    return _right(ops.grouped_mm(a, b, offsets, TILES["t64"]), want)


def _grouped_wgrad(ops: GemmLaunchers) -> bool:
    g = torch.Generator().manual_seed(0)
    want, segments = torch.zeros(3, 72, 136), []
    for counts in ((70, 0, 9), (150, 0, 40)):
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        rows = int(offsets[-1])
        grad, x = (torch.randn(rows, n, generator=g).bfloat16() for n in (72, 136))
        for e in range(3):
            own = slice(int(offsets[e]), int(offsets[e + 1]))
            want[e] += grad[own].float().T @ x[own].float()
        segments.append(Segment(grad, x, None, offsets, rows))
    out = ops.grouped_wgrad(segments, (3, 72, 136), out_dtype=torch.float32, tile=TILES["t64"])
    return _right(out, want)


def _right(out: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(out.float(), want, atol=0.02 * float(want.abs().max()))


CHECKS: dict[str, Callable[[GemmLaunchers], bool]] = {ROWS: _grouped_mm, WGRAD: _grouped_wgrad}


# --- edits


def _flatten(source: str) -> str:
    """A source with its gemm headers in place and without other includes, one instance only."""
    text = re.sub(r"#include.*\n", "", with_headers(source, GEMM_HEADER))
    text = re.sub(r" +case DType::k(Float16|Float32):\n +return [^;]*;\n", "", text)
    text = re.sub(r" +case kTile(16|32|128):\n +return [^;]*;\n", "", text)
    for unused in (
        "f(TileTag<kSlowPathTile>{}, std::false_type{})",
        "launch_product<Major::kMn>(args, stream)",
    ):
        text = text.replace(f"return {unused};", "return cudaErrorInvalidValue;")
    return text.replace(
        ": launch_instance<Chosen, T, fast>", ": launch_instance<Chosen, float, fast>"
    )


def _mutant(fault: Fault) -> str:
    text = _flatten(fault.source)
    assert fault.old in text, f"{fault.name}: the source no longer holds {fault.old!r}"
    name, args = LAUNCHERS[fault.source]
    text = text.replace(fault.old, fault.new)
    text = text.replace("namespace unipool {", f"namespace unipool::{fault.name} {{")
    return text + (
        f'extern "C" int {fault.name}_{name}(const unipool::{args}* args) {{\n'
        f"  return unipool::{fault.name}::launch_{name}(*args, nullptr);\n}}\n"
    )


INTACT = [Fault(f"intact_{LAUNCHERS[source][0]}", source, "", "") for source in CHECKS]


@pytest.fixture(scope="module")
def lib() -> Lib:
    """Every mutant of every kernel."""
    text = COMMON + "".join(_mutant(fault) for fault in (*INTACT, *FAULTS))
    source = build.kernel_source(build.CSRC / ROWS, "check", text=text, cute=True)
    return Lib(build.library("unipool_gemm_faults", [source], "check"))


class _Mutant(GemmLaunchers):
    """The launchers of one namespace."""

    def __init__(self, lib: Lib, fault: Fault) -> None:
        super().__init__(lib)
        self.fault = fault

    def _workspace(self, op: str, rows: int, experts: int) -> torch.Tensor:
        return torch.full((16 * rows + 4 * (experts * 129 + 1),), 255, dtype=torch.uint8)

    def _launch(self, op, args, tensors) -> None:
        self.lib.allow([t for t in tensors if t is not None])
        launch = getattr(self.lib.lib, f"{self.fault.name}_{op}")
        self.lib.check(op, launch(ctypes.byref(args)))


def _found(lib: Lib, fault: Fault) -> bool:
    try:
        for schedule in SCHEDULES:
            lib.schedule(*schedule)
            if not CHECKS[fault.source](_Mutant(lib, fault)):
                return True
    except LaunchError:
        return True
    finally:
        lib.schedule()
    return False


@pytest.mark.parametrize("fault", INTACT, ids=str)
def test_no_fault_is_found_in_the_kernels_as_they_are(lib: Lib, fault: Fault) -> None:
    assert not _found(lib, fault)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(lib: Lib, fault: Fault) -> None:
    assert _found(lib, fault)
