# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the pipelined products: the tests beside must be able to fail. A fault counts
as found if a launch fails with a report or any schedule gives a wrong result."""

import re
from collections.abc import Callable

import pytest
import torch
from gemm_launchers import GemmLaunchers, Segment
from kernel_library import Lib
from launchers import TILES
from source_faults import NONE, Fault, Planted, is_found, only_dtype

ROWS, WGRAD = "cuda/grouped_mm.cu", "cuda/grouped_wgrad.cu"
PRODUCT = "cuda/grouped_mm.cuh"
EPILOGUE, LOADERS, MAINLOOP, SCHEDULE, TILE = (
    f"cuda/device/gemm/{name}.cuh"
    for name in ("epilogue", "loaders", "mainloop", "schedule", "tile")
)
BARRIER = "__syncthreads();"
NEXT_TILE = "«cute::cp_async_wait<Tile::kStages - 2>();»"
FAULTS = [
    Fault("missing_wait", ROWS, MAINLOOP, NEXT_TILE, ";"),
    Fault(
        "wait_for_too_few", ROWS, MAINLOOP, NEXT_TILE, "cute::cp_async_wait<Tile::kStages - 1>();"
    ),
    Fault(
        *("missing_barrier", ROWS, MAINLOOP),
        *(f"cp_async_wait<Tile::kStages - 2>();\n    «{BARRIER}»", ";"),
    ),
    Fault("wrong_stage_written", ROWS, MAINLOOP, "load_a.load(«write_»)", "read_"),
    Fault(
        "wrong_stage_read",
        ROWS,
        MAINLOOP,
        "fetch(block + 1, «stages.read()»)",
        "(stages.read() + 1) % Tile::kStages",
    ),
    Fault(
        *("wrong_swizzle", ROWS, TILE),
        *("kMajor == Major::kK ? «Layout{}(line, column, 0)» :", "line * kDepth + column"),
    ),
    Fault("no_row_predicate", ROWS, LOADERS, "«exists ? contiguous_ : 0»", "contiguous_"),
    Fault(
        *("no_end_of_k", ROWS, LOADERS),
        *("(kLinesAlongK ? lines_ : contiguous_) -= «Operand::kDepth»;", "0"),
    ),
    Fault(
        *("no_store_predicate", ROWS, EPILOGUE),
        *("if («row < rows && column < columns») f(", "column < columns"),
    ),
    Fault(
        *("stale_tail", ROWS, SCHEDULE),
        *("offset(group + 1) : «rows_»", "offset(group)"),
    ),
    Fault("tail_multiplied", ROWS, PRODUCT, "load_b, tail ? «0» : ceil_div", "1"),
    Fault(
        *("no_barrier_before_the_store", ROWS, EPILOGUE),
        *(f"const Output output{{smem}};\n  «{BARRIER}»", ";"),
    ),
    Fault(
        *("no_barrier_after_the_store", ROWS, EPILOGUE),
        *(f"«{BARRIER}»\n}}\n\n}}  // namespace", ";"),
    ),
    Fault("row_of_another_expert", WGRAD, LOADERS, "«exists ? contiguous_ : 0»", "contiguous_"),
    Fault("table_not_advanced", WGRAD, LOADERS, "«table += Operand::kDepth * stride;»", ";"),
    Fault(
        *("segments_on_each_other", WGRAD, WGRAD),
        *("plan.starts[s * args.experts + e] = counts ? «count» : kNoRows;", "0"),
    ),
    Fault("stale_expert", WGRAD, WGRAD, "if («depth == 0 && p.add») return;", "depth == 0"),
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


# --- the kernels with their faults: bfloat16, one tile, operands that allow vectors


def _cut(text: str) -> str:
    text = re.sub(r" +case kTile(16|32|128):\n +return [^;]*;\n", "", only_dtype("BFloat16", text))
    slow = r"return f\(TileTag<(kSlowPathTile|kTileFloat)>{}, std::false_type{}\)"
    return re.sub(slow, "return cudaErrorInvalidValue", text)


PLANTED = {
    source: Planted(source, [f for f in FAULTS if f.check == source], _cut) for source in CHECKS
}


@pytest.fixture(scope="module")
def ops(lib: Lib) -> GemmLaunchers:
    return GemmLaunchers(lib)


@pytest.mark.parametrize("source", CHECKS)
def test_no_fault_is_found_in_the_kernels_as_they_are(ops: GemmLaunchers, source: str) -> None:
    with PLANTED[source].fault(NONE):
        assert not is_found(lambda: CHECKS[source](ops))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(ops: GemmLaunchers, fault: Fault) -> None:
    planted = PLANTED[fault.check]
    with planted.fault(planted.number(fault)):
        assert is_found(lambda: CHECKS[fault.check](ops))
