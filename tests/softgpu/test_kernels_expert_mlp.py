# SPDX-License-Identifier: Apache-2.0
"""The four products of the expert MLP against float64 (mlp_oracle.py): every tile and dtype, under
several schedules."""

import pytest
import torch
from kernel_library import SCHEDULES, Lib, bits_equal, running
from launchers import AUTO_TILE, DTYPES, TILES, misaligned
from mlp_launchers import Layer, MlpLaunchers
from mlp_oracle import Case, check_all, with_foreign_slots
from torch import Tensor

FAST = [
    Case(180, 5, 1, 72, 72, "skewed"),
    Case(75, 6, 2, 40, 136, "dropped"),
]
SLOW = [
    Case(30, 4, 2, 19, 37, "dropped"),
    Case(40, 1, 1, 5, 3, "uniform"),
    Case(9, 3, 1, 8, 8, "none"),
]


@pytest.fixture(scope="module")
def ops(lib: Lib) -> MlpLaunchers:
    return MlpLaunchers(lib)


FORCED = [  # float16 differs from bfloat16 in its arithmetic only
    *((tile, torch.bfloat16, case) for tile in ("t16", "t32", "t64", "t128") for case in FAST),
    *((tile, torch.float16, FAST[1]) for tile in ("t16", "t32", "t64", "t128")),
    *(("f32", torch.float32, case) for case in FAST),
]
EACH = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.mark.parametrize(
    ("tile", "dtype", "case"), FORCED, ids=[f"{t}-{str(d)[6:]}-{c.routing}" for t, d, c in FORCED]
)
def test_tile(ops: MlpLaunchers, tile: str, dtype: torch.dtype, case: Case) -> None:
    check_all(ops, case, case.layer(dtype), dtype, TILES[tile])


@pytest.mark.parametrize("case", SLOW, ids=str)
@EACH
def test_any_width(ops: MlpLaunchers, dtype: torch.dtype, case: Case) -> None:
    check_all(ops, case, case.layer(dtype), dtype, AUTO_TILE)


@EACH
def test_misaligned(ops: MlpLaunchers, dtype: torch.dtype) -> None:
    """Addresses one element behind a multiple of 16 bytes give the bits of aligned ones: the slow
    path sums in the same order."""
    case, moved = FAST[1], MlpLaunchers(ops.lib, misaligned)
    layer = case.layer(dtype)
    tile = TILES["f32" if dtype == torch.float32 else "t64"]
    x, grad = case.token_rows(layer, dtype), case.token_rows(layer, dtype)
    hidden = case.sorted_rows(layer, case.d_ff, dtype)
    preact = case.sorted_rows(layer, 2 * case.d_ff, dtype)
    for call in (
        lambda ops, tile: ops.up(layer, x, tile=tile),
        lambda ops, tile: [ops.down(layer, hidden, tile=tile)],
        lambda ops, tile: ops.hidden_bwd(layer, grad, preact, in_place=True, tile=tile),
        lambda ops, tile: [ops.input_bwd(layer, preact, tile=tile)],
    ):
        for aligned, other in zip(call(ops, tile), call(moved, AUTO_TILE), strict=True):
            assert bits_equal(aligned, other)


def test_foreign_slots(ops: MlpLaunchers) -> None:
    """A slot or row outside [0, N) is none, also among the rows of an expert."""
    case = FAST[1]
    layer = with_foreign_slots(case.layer(torch.bfloat16))
    check_all(ops, case, layer, torch.bfloat16, AUTO_TILE)


def test_idle_experts_are_not_touched(ops: MlpLaunchers) -> None:
    case = FAST[0]
    layer = case.layer(torch.bfloat16)
    active = (layer.offsets.diff() > 0).nonzero().flatten().tolist()
    assert 0 < len(active) < case.experts

    class Guarded(MlpLaunchers):
        def _launch(self, op, args, tensors):
            super()._launch(op, args, [p for t in tensors if t is not None for p in self.parts(t)])

        def parts(self, t: Tensor) -> list[Tensor]:
            return [t[e] for e in active] if t.dim() == 3 else [t]

    guarded = Guarded(ops.lib)
    x = case.token_rows(layer, torch.bfloat16)
    with running(SCHEDULES[0], check=True):
        preact, hidden = guarded.up(layer, x)
        guarded.down(layer, hidden)
        grad_preact, *_ = guarded.hidden_bwd(layer, x, preact, in_place=True)
        guarded.input_bwd(layer, grad_preact)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 8, 8), (4, 3, 2, 8, 0), (4, 3, 1, 0, 8)])
def test_empty(ops: MlpLaunchers, sizes: tuple[int, ...]) -> None:
    """No tokens, F = 0 and D = 0: sums without terms are zeros."""
    case = Case(*sizes, "uniform")
    order, inverse, offsets = case.plan()
    M, D, F = case.experts, case.d_model, case.d_ff
    weights = torch.ones(case.tokens, case.top_k)
    layer = Layer(torch.ones(M, 2 * F, D), torch.ones(M, D, F), weights, order, inverse, offsets)
    preact, hidden = ops.up(layer, torch.ones(case.tokens, D))
    results = [preact, hidden, ops.down(layer, hidden)]
    results += ops.hidden_bwd(layer, torch.ones(case.tokens, D), preact, in_place=False)
    results += [ops.input_bwd(layer, preact)]
    assert all((t == 0).all() for t in results)


def test_unknown_tiles_are_refused(ops: MlpLaunchers) -> None:
    case = FAST[1]
    for dtype, tile in ((torch.bfloat16, 99), (torch.bfloat16, TILES["f32"]), (torch.float32, 0)):
        layer = case.layer(dtype)
        with pytest.raises(RuntimeError, match=r"expert_up: 1$"):  # cudaErrorInvalidValue
            ops.up(layer, case.token_rows(layer, dtype), tile=tile)
