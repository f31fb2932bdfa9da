# SPDX-License-Identifier: Apache-2.0
"""The grouped products and the weight gradient against float64: every tile and dtype, forward and
backward, under several schedules with the checker on.

Operands that must not count are NaN: rows past the last expert's, weights of experts without rows,
and tensors to be written."""

from dataclasses import dataclass, replace

import pytest
import torch
from gemm_launchers import (
    MAX_WGRAD_SEGMENTS,
    TILES,
    GemmLaunchers,
    Segment,
)
from kernel_library import (
    SCHEDULES,
    LaunchError,
    Lib,
    RefusedError,
    bits_equal,
    running,
    under_schedules,
)
from launchers import DTYPES, misaligned
from specs import Tolerance
from tolerance import check_close
from torch import Tensor

from softgpu import calls

HALVES = [torch.bfloat16, torch.float16]
ROW_TILES = [*((d, t) for d in HALVES for t in TILES if t != "f32"), (torch.float32, "f32")]
WGRAD_TILES = [*((d, t) for d in HALVES for t in ("t64", "t128")), (torch.float32, "f32")]
SLOW_TILES = [*((d, "t64") for d in HALVES), (torch.float32, "f32")]


def _names(values: list) -> list[str]:
    return [f"{str(dtype).removeprefix('torch.')}-{tile}" for dtype, tile in values]


def _close(actual: Tensor, expected: Tensor, reduction: int, dtype: torch.dtype) -> None:
    check_close(actual, expected, Tolerance(reduction, roundings=1), dtype)


# --- rows times the matrix of their expert


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


def _run(
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
    _close(out, expected, a.shape[1], dtype)


# Experts without rows at the start, between and at the end; less than a tile, several tiles; n and
# K that end within a tile and within a stage; more stages than k tiles, and fewer.
RAGGED = [
    Rows((0, 5, 0, 70, 16, 0), 9, 136, 72),
    Rows((33,), 0, 264, 328),
    Rows((0, 0), 130, 8, 16),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", RAGGED, ids=str)
@pytest.mark.parametrize(("dtype", "tile"), ROW_TILES, ids=_names(ROW_TILES))
def test_grouped_mm(lib: Lib, dtype: torch.dtype, tile: str, case: Rows, backward: bool) -> None:
    _run(lib, case, dtype, TILES[tile], backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", [Rows((3, 0, 67), 2, 37, 45), Rows((9,), 1, 1, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tile"), SLOW_TILES, ids=_names(SLOW_TILES))
def test_grouped_mm_with_odd_sizes(
    lib: Lib, dtype: torch.dtype, tile: str, case: Rows, backward: bool
) -> None:
    _run(lib, case, dtype, TILES[tile], backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_mm_at_odd_addresses(lib: Lib, dtype: torch.dtype, backward: bool) -> None:
    _run(lib, Rows((4, 66), 3, 72, 40), dtype, -1, backward, moved=True)


def test_a_block_takes_several_tiles(lib: Lib) -> None:
    """Few multiprocessors are claimed: else none of these tests would reach a second tile."""
    a, b, offsets = Rows((70, 65), 2, 264, 40).inputs(torch.bfloat16, 40)
    with calls() as made:
        GemmLaunchers(lib).grouped_mm(a, b, offsets, TILES["t64"])
    assert [c["grid"] for c in made if c["call"] == "launch"] == ["5,1,1"]


def test_grouped_mm_of_many_experts(lib: Lib) -> None:
    counts = (*(int(e % 50 == 7) for e in range(1023)), 18)
    _run(lib, Rows(counts, 20, 16, 16), torch.bfloat16, TILES["t16"], False)


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


# --- the weight gradient


@dataclass(frozen=True)
class Layers:
    """Rows of each expert in each layer, and the weight's n and K."""

    counts: tuple[tuple[int, ...], ...]
    n: int
    k: int
    top_k: tuple[int, int] = (0, 0)  # of grad and of input; > 0: gathered through `order`

    def __str__(self) -> str:
        return f"L{len(self.counts)}-{self.n}x{self.k}-k{self.top_k[0]}{self.top_k[1]}"

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.counts[0]), self.n, self.k

    def segments(self, dtype: torch.dtype) -> list[Segment]:
        g = torch.Generator().manual_seed(len(self.counts) + self.n)
        return [self._segment(counts, dtype, g) for counts in self.counts]

    def _segment(self, counts: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Segment:
        """Two dropped slots at the end: rows past the last expert's."""
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        used, rows = int(offsets[-1]), int(offsets[-1]) + 2
        order = torch.randperm(rows, generator=g).int()
        order[used:] = -1
        operands = []
        for top_k, width in zip(self.top_k, (self.n, self.k), strict=True):
            tokens = rows if top_k == 0 else -(-rows // top_k)
            x = torch.randn(tokens, width, generator=g).to(dtype)
            if top_k == 0:
                x[used:] = torch.nan
            operands.append(x)
        return Segment(*operands, order if any(self.top_k) else None, offsets, rows)

    def expected(self, segments: list[Segment]) -> Tensor:
        out = torch.zeros(self.sizes, dtype=torch.float64)
        for s in segments:
            for e in range(self.sizes[0]):
                rows = torch.arange(int(s.offsets[e]), int(s.offsets[e + 1]))
                if s.order is not None:
                    rows = rows[(s.order[rows] >= 0) & (s.order[rows] < s.rows)]
                grad, x = (
                    t[rows if top_k == 0 else s.order[rows].long() // top_k].double()
                    for t, top_k in zip((s.grad, s.input), self.top_k, strict=True)
                )
                out[e] += grad.T @ x
        return out

    @property
    def depth(self) -> int:
        """The most rows of an expert."""
        return max(map(sum, zip(*self.counts, strict=True)))


def _wgrad(
    lib: Lib,
    case: Layers,
    dtype: torch.dtype,
    tile: int = -1,
    out_dtype: torch.dtype | None = None,
    *,
    moved: bool = False,
) -> None:
    segments = case.segments(dtype)
    if moved:
        segments = [
            Segment(misaligned(s.grad), misaligned(s.input), s.order, s.offsets, s.rows)
            for s in segments
        ]
    ops = GemmLaunchers(lib, misaligned if moved else lambda t: t)
    (out,) = under_schedules(
        lambda: [
            ops.grouped_wgrad(
                segments, case.sizes, top_k=case.top_k, out_dtype=out_dtype, tile=tile
            )
        ],
    )
    _close(out.flatten(1), case.expected(segments).flatten(1), case.depth, out.dtype)


LAYERS = [
    Layers(((5, 0, 40), (60, 0, 1), (0, 0, 33)), 136, 72, (0, 2)),
    Layers(((3, 70),), 72, 264, (1, 0)),
]


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize(("dtype", "tile"), WGRAD_TILES, ids=_names(WGRAD_TILES))
def test_grouped_wgrad(
    lib: Lib, dtype: torch.dtype, tile: str, case: Layers, out_dtype: torch.dtype | None
) -> None:
    _wgrad(lib, case, dtype, TILES[tile], out_dtype)


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("moved", [False, True], ids=["odd_sizes", "odd_addresses"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_wgrad_without_vectors(
    lib: Lib, dtype: torch.dtype, moved: bool, out_dtype: torch.dtype | None
) -> None:
    n, k = (72, 40) if moved else (37, 45)
    _wgrad(lib, Layers(((5, 0), (66, 0)), n, k, (2, 1)), dtype, -1, out_dtype, moved=moved)


@pytest.mark.parametrize(("dtype", "tile"), WGRAD_TILES, ids=_names(WGRAD_TILES))
@pytest.mark.parametrize("width", [72, 45], ids=["fast", "slow"])
def test_grouped_wgrad_adds(lib: Lib, dtype: torch.dtype, tile: str, width: int) -> None:
    """float32 sums grow; those of experts without rows are not touched."""
    if width == 45 and tile == "t128":
        pytest.skip("one tile has a slow path")
    case = Layers(((5, 0, 40), (60, 0, 1)), 136, width)
    segments = case.segments(dtype)
    before = torch.randn(case.sizes, generator=torch.Generator().manual_seed(1))
    before[1] = torch.nan  # would show if it were read and written back as another NaN or zero
    (out,) = under_schedules(
        lambda: [
            GemmLaunchers(lib).grouped_wgrad(
                segments, case.sizes, add_to=before.clone(), tile=TILES[tile]
            )
        ],
    )
    assert bits_equal(out[1], before[1])
    expected = before.double() + case.expected(segments)
    kept = [0, 2]
    _close(out[kept].flatten(1), expected[kept].flatten(1), case.depth, torch.float32)


def test_grouped_wgrad_of_many_segments(lib: Lib) -> None:
    case = Layers(((1, 0, 2),) * MAX_WGRAD_SEGMENTS, 8, 16)
    _wgrad(lib, case, torch.bfloat16)


@pytest.mark.parametrize("width", [72, 45], ids=["fast", "slow"])
def test_grouped_wgrad_of_foreign_slots(lib: Lib, width: int) -> None:
    """A slot outside of its segment's is none, also among the rows of an expert."""
    case = Layers(((5, 0, 40), (60, 0, 1)), 136, width, (0, 2))
    segments = case.segments(torch.bfloat16)
    for row, foreign in ((0, -7), (3, segments[0].rows), (20, 2**31 - 1)):
        segments[0].order[row] = foreign
    (out,) = under_schedules(
        lambda: [GemmLaunchers(lib).grouped_wgrad(segments, case.sizes, top_k=case.top_k)]
    )
    _close(out.flatten(1), case.expected(segments).flatten(1), case.depth, out.dtype)


@pytest.mark.parametrize(
    ("offsets", "rows"),
    [
        ([0, 5, 2**31 - 1, 47], [0, 5, 47, 47]),
        ([-3, 5, 60, 61], [0, 5, 47, 47]),
        ([30, 35, 35, 44], [30, 35, 35, 44]),
        ([40, 5, 9, 90], None),
        ([0, 30, 10, 45], None),
        ([9, 8, 7, 6], None),
    ],
    ids=str,
)
def test_grouped_wgrad_of_foreign_offsets(
    lib: Lib, offsets: list[int], rows: list[int] | None
) -> None:
    """They are cut to the rows that exist; a segment in which they descend has none. No memory
    outside of the operands is touched: the checker would see."""
    case = Layers(((5, 0, 40), (60, 0, 1)), 136, 72)
    first, second = case.segments(torch.bfloat16)
    filled = {"grad": first.grad.nan_to_num(1.0), "input": first.input.nan_to_num(1.0)}
    first = replace(first, **filled)  # the rows past the last expert's count here
    given = replace(first, offsets=torch.tensor(offsets).int())
    meant = replace(first, offsets=torch.tensor(rows or [0, 0, 0, 0]).int())
    with running(SCHEDULES[0], check=True):
        out = GemmLaunchers(lib).grouped_wgrad([given, second], case.sizes)
    expected = case.expected([meant, second])
    _close(out.flatten(1), expected.flatten(1), case.depth, out.dtype)


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


def test_a_workspace_has_nothing_beside_it(lib: Lib) -> None:
    """What is written beside it is outside of what a kernel was given."""
    workspace = GemmLaunchers(lib).workspace("grouped_wgrad", 64, 3, 144)
    beside = workspace.untyped_storage().nbytes() - workspace.nbytes
    assert workspace.storage_offset() >= 4096
    assert beside >= 2 * 4096


@pytest.mark.parametrize("counts", [((0, 0),), ((0, 0), (0, 0))], ids=str)
def test_grouped_wgrad_without_rows_is_zero(lib: Lib, counts: tuple) -> None:
    case = Layers(counts, 16, 8)
    for out_dtype in (None, torch.float32):
        out = GemmLaunchers(lib).grouped_wgrad(
            case.segments(torch.bfloat16), case.sizes, out_dtype=out_dtype
        )
        assert torch.equal(out, torch.zeros_like(out))
