# SPDX-License-Identifier: Apache-2.0
"""The weight gradient against float64: every tile and dtype, under several schedules with the
checker on. Rows past the last expert's and tensors to be written are NaN."""

from dataclasses import dataclass, replace

import pytest
import torch
from gemm_launchers import MAX_WGRAD_SEGMENTS, GemmLaunchers, Segment
from kernel_library import SCHEDULES, Lib, bits_equal, running, under_schedules
from launchers import DTYPES, TILES, misaligned
from products import HALVES, check_product, names
from torch import Tensor

WGRAD_TILES = [*((d, t) for d in HALVES for t in ("t64", "t128")), (torch.float32, "f32")]


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


def check_layers(
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
    check_product(out.flatten(1), case.expected(segments).flatten(1), case.depth, out.dtype)


LAYERS = [
    Layers(((5, 0, 40), (60, 0, 1), (0, 0, 33)), 136, 72, (0, 2)),
    Layers(((3, 70),), 72, 264, (1, 0)),
]


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize(("dtype", "tile"), WGRAD_TILES, ids=names(WGRAD_TILES))
def test_grouped_wgrad(
    lib: Lib, dtype: torch.dtype, tile: str, case: Layers, out_dtype: torch.dtype | None
) -> None:
    check_layers(lib, case, dtype, TILES[tile], out_dtype)


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("moved", [False, True], ids=["odd_sizes", "odd_addresses"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_wgrad_without_vectors(
    lib: Lib, dtype: torch.dtype, moved: bool, out_dtype: torch.dtype | None
) -> None:
    n, k = (72, 40) if moved else (37, 45)
    check_layers(lib, Layers(((5, 0), (66, 0)), n, k, (2, 1)), dtype, -1, out_dtype, moved=moved)


@pytest.mark.parametrize(("dtype", "tile"), WGRAD_TILES, ids=names(WGRAD_TILES))
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
    check_product(out[kept].flatten(1), expected[kept].flatten(1), case.depth, torch.float32)


def test_grouped_wgrad_of_many_segments(lib: Lib) -> None:
    case = Layers(((1, 0, 2),) * MAX_WGRAD_SEGMENTS, 8, 16)
    check_layers(lib, case, torch.bfloat16)


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
    check_product(out.flatten(1), case.expected(segments).flatten(1), case.depth, out.dtype)


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
    check_product(out.flatten(1), expected.flatten(1), case.depth, out.dtype)


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
