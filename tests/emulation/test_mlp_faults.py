# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernels of the expert MLP: the tests beside must be able to fail.

A fault is an edit of a source's text. CuTe takes long to compile, so all of them go into one
library (check flavour, float32 only), each behind a switch that is set before a run. A fault counts
as found if a launch fails with a report or any schedule gives a wrong result.
"""

import ctypes
import re
from collections.abc import Sequence
from ctypes import c_int
from dataclasses import dataclass

import pytest
import torch
from emulib import LaunchError, Lib, read_source, with_headers
from mlp_launchers import AUTO_TILE, SOURCES, MlpLaunchers, mlp_library
from test_emulated_mlp import (
    Case,
    check_down,
    check_hidden_bwd,
    check_input_bwd,
    check_up,
    with_foreign_slots,
)
from torch import Tensor

UP, BWD, SHARED, SLOTS, SWIGLU = (
    f"cuda/{name}"
    for name in (
        *("expert_mlp.cu", "expert_mlp_bwd.cu", "expert_mlp.cuh"),
        *("device/gemm/slots.cuh", "device/gemm/swiglu.cuh"),
    )
)
LAUNCH = "cuda/device/gemm/launch.cuh"
INLINED = re.compile(rf'#include "({"|".join(map(re.escape, (SHARED, SLOTS, SWIGLU, LAUNCH)))})"\n')
SWITCH = "planted_fault"


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (behind `after`, once) becomes `new`; the check of `product` must see it."""

    name: str
    product: str
    file: str
    old: str
    new: str
    after: str = ""

    def __str__(self) -> str:
        return self.name

    def plant(self, text: str, number: int) -> str:
        """Both versions, statements or expressions, and the choice between them."""
        old = self.after + self.old
        assert text.count(old) == 1, f"{self.name}: {self.file} must hold {old!r} once"
        if self.old.endswith(";"):
            both = f"if ({SWITCH} == {number}) {{ {self.new} }} else {{ {self.old} }}"
        else:
            both = f"({SWITCH} == {number} ? {self.new} : {self.old})"
        return text.replace(old, self.after + both)


BARRIER, DEPTH = "__syncthreads();", "ceil_div(depth, Tile::kK)"
UP_TILE = "store_hidden<Tile, kVector>(staged, args, tile, slots);\n    "
BWD_TILE = "store_gradients<Tile, kVector>(staged, args, tile, slots);\n    "
FAULTS = [
    Fault("halves_swapped", "up", UP, "line % (2 * kGroup) < kGroup", "line % (2 * kGroup) > 7"),
    Fault("weights_past_the_end", "up", UP, "int(d_ff) - row", "int(d_ff) + 64 - row"),
    Fault("gate_for_up", "up", UP, "shared_chunk(from + kGroup)", "shared_chunk(from)"),
    Fault("no_row_predicate", "up", UP, "row >= tile.rows || left <= 0", "left <= 0"),
    Fault("no_column_predicate", "up", UP, "row >= tile.rows || left <= 0", "row >= tile.rows"),
    Fault("tail_multiplied", "up", UP, f"tail ? 0 : {DEPTH}", DEPTH),
    Fault("next_tile_too_early", "up", UP, BARRIER, ";", UP_TILE),
    Fault("token_of_slot", "up", SLOTS, "slot / top_k", "slot"),
    Fault("slot_unchecked", "up", SLOTS, "unsigned(index) < unsigned(rows)", "true"),
    Fault("stored_past_the_row", "up", SLOTS, "if (i < left) to[i] = t[i];", "to[i] = t[i];"),
    Fault("pipeline_still_read", "up", SHARED, BARRIER, ";", "const F& f) {\n  "),
    Fault("not_yet_staged", "up", SHARED, BARRIER, ";", "column, value);\n  });\n  "),
    Fault("order_past_the_end", "down", SLOTS, "r < tile.rows && tile.expert < experts", "true"),
    Fault("one_dropped_token_a_warp", "down", SLOTS, "left &= left - 1", "left = 0"),
    Fault(
        *("dropped_tokens_unwritten", "down", SHARED),
        *("zero_dropped_tokens<kVector>(args.inverse, out, args.rows, width);", ";"),
    ),
    Fault("weight_of_the_row", "down", SHARED, "args.weights + slots[r]", "args.weights + r"),
    Fault("no_weight", "down", SHARED, "factors[row] * v", "v"),
    Fault(
        *("stored_in_sorted_order", "down", SHARED),
        *("args.top_k == 1 ? slots[row] : tile.row + row", "tile.row + row"),
    ),
    Fault("stored_to_no_slot", "down", SHARED, "if (to < 0) return;", ";"),
    Fault("next_rows_too_early", "down", SHARED, BARRIER, ";", "column);\n    });\n    "),
    Fault("tail_of_the_gradient", "input_bwd", SHARED, f"tail ? 0 : {DEPTH}", DEPTH),
    Fault("silu_not_differentiated", "hidden_bwd", SWIGLU, "silu * (1.f - s)", "0.f"),
    Fault("loaded_past_the_row", "hidden_bwd", SLOTS, "i < left ? from[i] : T(0.f)", "from[i]"),
    Fault("hidden_without_weight", "hidden_bwd", BWD, "weight * bwd.value", "bwd.value"),
    Fault("rows_of_the_next_tile", "hidden_bwd", BWD, "row < tile.rows && left > 0", "left > 0"),
    Fault("lanes_lost", "hidden_bwd", BWD, "dot = group_sum<kLanes>(dot);", ";"),
    Fault("parts_overwritten", "hidden_bwd", BWD, "tile.column / Tile::kN * args.rows", "0"),
    Fault("first_part_only", "hidden_bwd", BWD, "t * rows + row", "row"),
    Fault("dropped_slots_unwritten", "hidden_bwd", BWD, "grad_weights[row] = 0.f;", ";"),
    Fault(
        *("sum_to_no_slot", "hidden_bwd", BWD),
        *("row < __ldg(rows_used) && slot >= 0", "row < __ldg(rows_used)"),
    ),
    Fault("next_gradients_too_early", "hidden_bwd", BWD, BARRIER, ";", BWD_TILE),
]


# --- the library with all of them


def _planted(name: str) -> str:
    text = read_source(name)
    for number, fault in enumerate(FAULTS):
        if fault.file == name:
            text = fault.plant(text, number)
    return text


def _flatten(source: str) -> str:
    """A source with the edited headers in place and instances for float32 only."""
    text = with_headers(source, INLINED, _planted)
    return re.sub(r"    case DType::k(Float16|BFloat16):\n      return [^;]*;\n", "", text)


def _faulty_library() -> Lib:
    switch = f'extern "C" int {SWITCH};\n'
    text = {name: switch + _flatten(name) for name in SOURCES}
    text[UP] += f"int {SWITCH} = -1;\n"
    return Lib(mlp_library("check", text))


class FaultyLaunchers(MlpLaunchers):
    """Kernels that read which of the faults, if any, is switched on."""

    def __init__(self, lib: Lib) -> None:
        super().__init__(lib)
        self.switch = torch.frombuffer((c_int * 1).in_dll(lib.lib, SWITCH), dtype=torch.int32)

    def _launch(self, op: str, args: ctypes.Structure, tensors: Sequence[Tensor | None]) -> None:
        super()._launch(op, args, [*tensors, self.switch])


# --- what is run

CASES = [  # with and without foreign slots; more tiles than blocks, widths for either path
    (Case(90, 4, 2, 72, 72, "dropped"), True),
    (Case(150, 4, 1, 20, 36, "dropped"), False),
    (Case(70, 3, 1, 8, 16, "dropped"), True),
    (Case(20, 1, 1, 7, 5, "uniform"), False),
]


def _check(ops: MlpLaunchers, product: str) -> None:
    dtype = torch.float32
    for case, foreign in CASES:
        layer = case.layer(dtype)
        layer = with_foreign_slots(layer) if foreign else layer
        tokens, preact = (
            case.token_rows(layer, dtype),
            case.sorted_rows(layer, 2 * case.d_ff, dtype),
        )
        if product == "up":
            check_up(ops, layer, tokens, AUTO_TILE)
        elif product == "down":
            check_down(ops, layer, case.sorted_rows(layer, case.d_ff, dtype), AUTO_TILE)
        elif product == "hidden_bwd":
            check_hidden_bwd(ops, layer, tokens, preact, AUTO_TILE)
        else:
            check_input_bwd(ops, layer, preact, AUTO_TILE)


@pytest.fixture(scope="module")
def faulty() -> FaultyLaunchers:
    return FaultyLaunchers(_faulty_library())


@pytest.mark.parametrize("product", ["up", "down", "hidden_bwd", "input_bwd"])
def test_no_fault_is_found_in_the_kernels_as_they_are(
    faulty: FaultyLaunchers, product: str
) -> None:
    faulty.switch.fill_(-1)
    _check(faulty, product)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(faulty: FaultyLaunchers, fault: Fault) -> None:
    faulty.switch.fill_(FAULTS.index(fault))
    with pytest.raises((AssertionError, LaunchError)):
        _check(faulty, fault.product)
