# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernels of the expert MLP: the tests beside must be able to fail. A fault
counts as found if a launch fails with a report or any schedule gives a wrong result."""

from functools import partial

import pytest
import torch
from kernel_library import Lib
from launchers import AUTO_TILE
from mlp_launchers import MlpLaunchers
from mlp_oracle import (
    Case,
    check_down,
    check_hidden_bwd,
    check_input_bwd,
    check_up,
    with_foreign_slots,
)
from source_faults import NONE, Fault, Planted, fails, only_dtype

UP, BWD, SHARED, SLOTS, SWIGLU = (
    f"cuda/{name}"
    for name in (
        *("expert_mlp.cu", "expert_mlp_bwd.cu", "expert_mlp.cuh"),
        *("device/gemm/slots.cuh", "device/gemm/swiglu.cuh"),
    )
)
FAULTS = [
    Fault("halves_swapped", "up", UP, "«line % (2 * kGroup) < kGroup»", "line % (2 * kGroup) > 7"),
    Fault("weights_past_the_end", "up", UP, "«int(d_ff) - row»", "int(d_ff) + 64 - row"),
    Fault("gate_for_up", "up", UP, "«shared_chunk(from + kGroup)»", "shared_chunk(from)"),
    Fault("no_row_predicate", "up", UP, "«row >= tile.rows || left <= 0»", "left <= 0"),
    Fault("no_column_predicate", "up", UP, "«row >= tile.rows || left <= 0»", "row >= tile.rows"),
    Fault(
        *("tail_multiplied", "up", UP),
        *("«tail ? 0 : ceil_div(depth, Tile::kK)»", "ceil_div(depth, Tile::kK)"),
    ),
    Fault(
        *("next_tile_too_early", "up", UP),
        *("store_hidden<Tile, kVector>(staged, args, tile, slots);\n    «__syncthreads();»", ";"),
    ),
    Fault("token_of_slot", "up", SLOTS, "«slot / top_k»", "slot"),
    Fault("slot_unchecked", "up", SLOTS, "«unsigned(index) < unsigned(rows)»", "true"),
    Fault("stored_past_the_row", "up", SLOTS, "«if (i < left) to[i] = t[i];»", "to[i] = t[i];"),
    Fault("pipeline_still_read", "up", SHARED, "const F& f) {\n  «__syncthreads();»", ";"),
    Fault("not_yet_staged", "up", SHARED, "column, value);\n  });\n  «__syncthreads();»", ";"),
    Fault("order_past_the_end", "down", SLOTS, "«r < tile.rows && tile.expert < experts»", "true"),
    Fault("one_dropped_token_a_warp", "down", SLOTS, "«left &= left - 1»", "left = 0"),
    Fault(
        *("dropped_tokens_unwritten", "down", SHARED),
        *("«zero_dropped_tokens<kVector>(args.inverse, out, args.rows, width);»", ";"),
    ),
    Fault("weight_of_the_row", "down", SHARED, "«args.weights + slots[r]»", "args.weights + r"),
    Fault("no_weight", "down", SHARED, "«factors[row] * v»", "v"),
    Fault(
        *("stored_in_sorted_order", "down", SHARED),
        *("«args.top_k == 1 ? slots[row] : tile.row + row»", "tile.row + row"),
    ),
    Fault("stored_to_no_slot", "down", SHARED, "«if (to < 0) return;»", ";"),
    Fault("next_rows_too_early", "down", SHARED, "column);\n    });\n    «__syncthreads();»", ";"),
    Fault(
        *("tail_of_the_gradient", "input_bwd", SHARED),
        *("«tail ? 0 : ceil_div(depth, Tile::kK)»", "ceil_div(depth, Tile::kK)"),
    ),
    Fault("silu_not_differentiated", "hidden_bwd", SWIGLU, "«silu * (1.f - s)»", "0.f"),
    Fault("loaded_past_the_row", "hidden_bwd", SLOTS, "«i < left ? from[i] : T(0.f)»", "from[i]"),
    Fault("hidden_without_weight", "hidden_bwd", BWD, "«weight * bwd.value»", "bwd.value"),
    Fault("rows_of_the_next_tile", "hidden_bwd", BWD, "«row < tile.rows && left > 0»", "left > 0"),
    Fault("lanes_lost", "hidden_bwd", BWD, "«dot = group_sum<kLanes>(dot);»", ";"),
    Fault("parts_overwritten", "hidden_bwd", BWD, "«tile.column / Tile::kN * args.rows»", "0"),
    Fault("first_part_only", "hidden_bwd", BWD, "«t * rows + row»", "row"),
    Fault("dropped_slots_unwritten", "hidden_bwd", BWD, "«grad_weights[row] = 0.f;»", ";"),
    Fault(
        *("sum_to_no_slot", "hidden_bwd", BWD),
        *("«row < __ldg(rows_used) && slot >= 0»", "row < __ldg(rows_used)"),
    ),
    Fault(
        *("next_gradients_too_early", "hidden_bwd", BWD),
        *(
            "store_gradients<Tile, kVector>(staged, args, tile, slots);\n    «__syncthreads();»",
            ";",
        ),
    ),
]


# --- what is run

CASES = [  # with and without foreign slots; more tiles than blocks, widths for either path
    (Case(90, 4, 2, 72, 72, "dropped"), True),
    (Case(150, 4, 1, 20, 36, "dropped"), False),
    (Case(70, 3, 1, 8, 16, "dropped"), True),
    (Case(20, 1, 1, 7, 5, "uniform"), False),
]


def _check(ops: MlpLaunchers, product: str) -> bool:
    """Under all schedules."""
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
    return True


# --- the kernels with their faults, for float32 only

PRODUCTS = {UP: ("up", "down"), BWD: ("hidden_bwd", "input_bwd")}
PLANTED = {
    product: planted
    for source, products in PRODUCTS.items()
    for planted in [
        Planted(source, [f for f in FAULTS if f.check in products], partial(only_dtype, "Float32"))
    ]
    for product in products
}


@pytest.fixture(scope="module")
def ops(lib: Lib) -> MlpLaunchers:
    return MlpLaunchers(lib)


@pytest.mark.parametrize("product", PLANTED)
def test_no_fault_is_found_in_the_kernels_as_they_are(ops: MlpLaunchers, product: str) -> None:
    with PLANTED[product].fault(NONE):
        assert not fails(lambda: _check(ops, product))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(ops: MlpLaunchers, fault: Fault) -> None:
    planted = PLANTED[fault.check]
    with planted.fault(planted.number(fault)):
        assert fails(lambda: _check(ops, fault.check))
