# SPDX-License-Identifier: Apache-2.0
"""The grouped products against float64: every tile and dtype, forward and backward, under several
schedules with the checker on.

Operands that must not count are NaN: rows past the last expert's, weights of experts without rows,
and tensors to be written."""

from dataclasses import dataclass

import pytest
import torch
from gemm_launchers import GemmLaunchers
from kernel_library import (
    SCHEDULES,
    LaunchError,
    Lib,
    RefusedError,
    bits_equal,
    running,
    under_schedules,
)
from launchers import DTYPES, TILES, misaligned
from products import HALVES, check_product, names
from torch import Tensor

from softgpu import calls

ROW_TILES = [*((d, t) for d in HALVES for t in TILES if t != "f32"), (torch.float32, "f32")]
SLOW_TILES = [*((d, "t64") for d in HALVES), (torch.float32, "f32")]


@dataclass(frozen=True)
class Rows:
    """Rows of each expert, rows past them, and the matrices' n and K."""

    counts: tuple[int, ...]
    tail: int
    n: int
    k: int

    def __str__(self) -> str:
        counts = "+".join(map(str, self.counts)) if len(self.counts) < 8 else "many"
        return f"{counts}-tail{self.tail}-{self.n}x{self.k}"

    def inputs(self, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """a [N, width], b [M, n, K], offsets [M + 1]"""
        g = torch.Generator().manual_seed(sum(self.counts) + self.n)
        offsets = torch.tensor([0, *self.counts]).cumsum(0).int()
        a = torch.randn(int(offsets[-1]) + self.tail, width, generator=g)
        b = torch.randn(len(self.counts), self.n, self.k, generator=g)
        a[int(offsets[-1]) :] = torch.nan
        b[torch.tensor(self.counts) == 0] = torch.nan
        return a.to(dtype), b.to(dtype), offsets


def check_rows(
    lib: Lib, case: Rows, dtype: torch.dtype, tile: int, backward: bool, *, moved: bool = False
) -> None:
    a, b, offsets = case.inputs(dtype, case.n if backward else case.k)
    if moved:
        a, b = misaligned(a), misaligned(b)
    ops = GemmLaunchers(lib, misaligned if moved else lambda t: t)
    op = ops.grouped_mm_bwd_a if backward else ops.grouped_mm
    (out,) = under_schedules(lambda: [op(a, b, offsets, tile)])
    expected = torch.zeros(out.shape, dtype=torch.float64)
    for e, matrix in enumerate(b.double()):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        expected[rows] = a[rows].double() @ (matrix if backward else matrix.T)
    check_product(out, expected, a.shape[1], dtype)


# Experts without rows at the start, between and at the end; less than a tile, several tiles; n and
# K that end within a tile and within a stage; more stages than k tiles, and fewer.
RAGGED = [
    Rows((0, 5, 0, 70, 16, 0), 9, 136, 72),
    Rows((33,), 0, 264, 328),
    Rows((0, 0), 130, 8, 16),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", RAGGED, ids=str)
@pytest.mark.parametrize(("dtype", "tile"), ROW_TILES, ids=names(ROW_TILES))
def test_grouped_mm(lib: Lib, dtype: torch.dtype, tile: str, case: Rows, backward: bool) -> None:
    check_rows(lib, case, dtype, TILES[tile], backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", [Rows((3, 0, 67), 2, 37, 45), Rows((9,), 1, 1, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tile"), SLOW_TILES, ids=names(SLOW_TILES))
def test_grouped_mm_with_odd_sizes(
    lib: Lib, dtype: torch.dtype, tile: str, case: Rows, backward: bool
) -> None:
    check_rows(lib, case, dtype, TILES[tile], backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_mm_at_odd_addresses(lib: Lib, dtype: torch.dtype, backward: bool) -> None:
    check_rows(lib, Rows((4, 66), 3, 72, 40), dtype, -1, backward, moved=True)


def test_a_block_takes_several_tiles(lib: Lib) -> None:
    """Few multiprocessors are claimed: else none of these tests would reach a second tile."""
    a, b, offsets = Rows((70, 65), 2, 264, 40).inputs(torch.bfloat16, 40)
    with calls() as made:
        GemmLaunchers(lib).grouped_mm(a, b, offsets, TILES["t64"])
    assert [c["grid"] for c in made if c["call"] == "launch"] == ["5,1,1"]


def test_grouped_mm_of_many_experts(lib: Lib) -> None:
    counts = (*(int(e % 50 == 7) for e in range(1023)), 18)
    check_rows(lib, Rows(counts, 20, 16, 16), torch.bfloat16, TILES["t16"], False)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (5, 0, 8), (5, 8, 0)], ids=str)
def test_grouped_mm_of_nothing(lib: Lib, sizes: tuple[int, int, int]) -> None:
    rows, n, k = sizes
    out = GemmLaunchers(lib).grouped_mm(
        torch.ones(rows, k), torch.ones(2, n, k), torch.tensor([0, rows, rows]).int()
    )
    assert torch.equal(out, torch.zeros(rows, n))


@pytest.mark.parametrize("tile", list(TILES.values()))
def test_a_row_reaches_no_other_row(lib: Lib, tile: int) -> None:
    dtype = torch.float32 if tile == TILES["f32"] else torch.bfloat16
    a, b, offsets = Rows((20, 21), 0, 128, 64).inputs(dtype, 64)
    clean = GemmLaunchers(lib).grouped_mm(a, b, offsets, tile)
    a[19] = torch.nan
    out = GemmLaunchers(lib).grouped_mm(a, b, offsets, tile)
    assert out[19].isnan().all()
    out[19] = clean[19]
    assert bits_equal(out, clean)


@pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.bfloat16, "f32"), (torch.float32, "t64"), (torch.float16, None)],
    ids=["bfloat16-f32", "float32-t64", "float16-unknown"],
)
def test_a_tile_that_is_not_compiled_is_refused(lib: Lib, dtype: torch.dtype, tile: str) -> None:
    a, b, offsets = Rows((3,), 0, 8, 8).inputs(dtype, 8)
    with pytest.raises(RefusedError):
        GemmLaunchers(lib).grouped_mm(a, b, offsets, len(TILES) if tile is None else TILES[tile])


@pytest.mark.parametrize("offsets", [[70, 80, 90, 95], [-7, 0, 40, 2**31 - 1]], ids=str)
@pytest.mark.parametrize("way", ["grouped_mm", "grouped_mm_bwd_a"])
def test_products_of_foreign_offsets(lib: Lib, way: str, offsets: list[int]) -> None:
    """They are cut to the rows that exist: no others are read or written."""
    a, b = torch.ones(64, 72).bfloat16(), torch.ones(3, 72, 72).bfloat16()
    with running(SCHEDULES[0], check=True):
        out = getattr(GemmLaunchers(lib), way)(a, b, torch.tensor(offsets).int())
    cut = torch.tensor(offsets).clamp(0, 64)
    written = torch.zeros(64, 72)
    written[cut[0] : cut[-1]] = 72
    assert torch.equal(out[cut[0] :].float(), written[cut[0] :])


@pytest.mark.parametrize("offsets", [[0, 30, 10, 64], [-7, 0, 2**31 - 1, 3]], ids=str)
@pytest.mark.parametrize("way", ["grouped_mm", "grouped_mm_bwd_a"])
def test_products_of_offsets_that_descend(lib: Lib, way: str, offsets: list[int]) -> None:
    """Rows of two experts are written twice: a race, but of rows that exist."""
    a, b = torch.ones(64, 72).bfloat16(), torch.ones(3, 72, 72).bfloat16()
    multiply = getattr(GemmLaunchers(lib), way)
    with running(SCHEDULES[0], check=True), pytest.raises(LaunchError, match=": race "):
        multiply(a, b, torch.tensor(offsets).int())
