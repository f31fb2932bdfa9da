# SPDX-License-Identifier: Apache-2.0
"""Right results, damaged: what the bounds must reject."""

import pytest
import torch
from mutants import DTYPES, FORMULAS, judge, problem, rows
from specs import (
    DISPATCH_PLAN,
    EXPERT_MLP,
    GROUPED_MM,
    NORM_TOPK,
    PERMUTE,
    ROUTER_LOGITS,
    SOFTMAX_TOPK,
    UNPERMUTE_WEIGHTED,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def busiest(t: Tensor) -> int:
    return int(rows(t).abs().double().sum(1).argmax())


def zeroed(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def negated(t: Tensor) -> Tensor:
    return -t


def rolled_rows(t: Tensor) -> Tensor:
    return t.roll(1, 0)


def scaled_by_5_percent(t: Tensor) -> Tensor:
    return (t.double() * 1.05).to(t.dtype)


def one_row_lost(t: Tensor) -> Tensor:
    rows(t := t.clone())[busiest(t)] = 0
    return t


def one_row_stale(t: Tensor) -> Tensor:
    source = rows(t)[(busiest(t) + 1) % rows(t).shape[0]].clone()
    rows(t := t.clone())[busiest(t)] = source
    return t


def one_element_off_by_a_third(t: Tensor) -> Tensor:
    flat = (t := t.clone()).view(-1)
    at = flat.abs().argmax()
    flat[at] = flat[at] * 4 / 3
    return t


def one_nan(t: Tensor) -> Tensor:
    (t := t.clone()).view(-1)[-1] = torch.nan
    return t


def noise_in_a_zero_row(t: Tensor) -> Tensor:
    empty = rows(t).eq(0).all(1).nonzero()
    rows(t := t.clone())[empty[0]] = 1e-20
    return t


def missing(t: Tensor) -> None:
    return None


def one_row_short(t: Tensor) -> Tensor:
    return t[:-1]


def in_float64(t: Tensor) -> Tensor:
    return t.double()


ANY_FLOAT = [
    zeroed,
    negated,
    scaled_by_5_percent,
    one_row_lost,
    one_element_off_by_a_third,
    one_nan,
]

PER_ROW = [rolled_rows, one_row_stale, one_row_short]

DAMAGES = [
    *[
        (spec, case, result, damage)
        for spec, case, results in (
            (NORM_TOPK, "ragged", ["weights", "importance", "grad_logits"]),
            (SOFTMAX_TOPK, "ragged", ["weights", "importance", "grad_logits"]),
            (ROUTER_LOGITS, "ragged", ["logits", "grad_x", "grad_weight"]),
            (PERMUTE, "ragged", ["rows", "grad_x"]),
            (UNPERMUTE_WEIGHTED, "ragged", ["out", "grad_y", "grad_weights"]),
            (GROUPED_MM, "ragged", ["out", "grad_a", "grad_b"]),
            (EXPERT_MLP, "ragged", ["y", "grad_x", "grad_weights", "grad_gate_up", "grad_down"]),
        )
        for result in results
        for damage in [*ANY_FLOAT, *PER_ROW, missing, in_float64]
    ],
    *[(NORM_TOPK, "ragged", "grad_scale", damage) for damage in (zeroed, negated, missing)],
    (NORM_TOPK, "dead_row", "weights", noise_in_a_zero_row),
    (NORM_TOPK, "dead_row", "grad_logits", noise_in_a_zero_row),
    (GROUPED_MM, "ragged", "grad_b", noise_in_a_zero_row),
    (EXPERT_MLP, "ragged", "grad_gate_up", noise_in_a_zero_row),
    (EXPERT_MLP, "ragged", "grad_down", noise_in_a_zero_row),
    (EXPERT_MLP, "dropped", "grad_x", noise_in_a_zero_row),
    (PERMUTE, "dropped", "rows", noise_in_a_zero_row),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("spec", "case", "result", "damage"),
    DAMAGES,
    ids=[f"{spec}-{result}-{damage.__name__}" for spec, _, result, damage in DAMAGES],
)
def test_a_damaged_result_is_rejected(spec, case, result, damage, dtype):
    _, right, _ = problem(spec, case, dtype)
    judge(spec, case, dtype, right)
    with pytest.raises(AssertionError):
        judge(spec, case, dtype, right | {result: damage(right[result])})


def changed(index: tuple, by: int):
    def damage(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] += by
        return t

    return damage


def two_slots_swapped(order: Tensor) -> Tensor:
    order = order.clone()
    order[[0, 1]] = order[[1, 0]]
    return order


INTEGER_DAMAGES = [
    (NORM_TOPK, "ties", "experts", lambda t: t.flip(1), "slots in reverse order"),
    (NORM_TOPK, "ties", "load", changed((3,), 1), "one token too many"),
    (NORM_TOPK, "ties", "load", lambda t: t.roll(1), "load of the neighbour"),
    (SOFTMAX_TOPK, "ties", "experts", changed((5, 3), 1), "one wrong id"),
    (DISPATCH_PLAN, "dropped", "offsets", changed((2,), 1), "offset off by one"),
    (DISPATCH_PLAN, "dropped", "offsets", lambda t: t[1:], "first offset missing"),
    (DISPATCH_PLAN, "all_to_one_expert", "order", two_slots_swapped, "sort not stable"),
    (DISPATCH_PLAN, "dropped", "order", lambda t: t.clamp(min=0), "tail is 0, not -1"),
    (DISPATCH_PLAN, "dropped", "inverse", lambda t: t.clamp(min=0), "dropped slot at row 0"),
    (DISPATCH_PLAN, "ragged", "inverse", lambda t: t.roll(1, 0), "rows of another token"),
    (DISPATCH_PLAN, "ragged", "order", lambda t: t.long(), "int64"),
    (DISPATCH_PLAN, "ragged", "inverse", lambda t: t.flatten(), "flat inverse"),
    (DISPATCH_PLAN, "ragged", "order", lambda t: t // 2, "tokens, not slots"),
]


@pytest.mark.parametrize(
    ("spec", "case", "result", "damage", "fault"),
    INTEGER_DAMAGES,
    ids=[f"{spec}-{case}-{result}-{fault}" for spec, case, result, _, fault in INTEGER_DAMAGES],
)
def test_a_damaged_integer_is_rejected(spec, case, result, damage, fault):
    _, right, _ = problem(spec, case, torch.float32)
    judge(spec, case, torch.float32, right)
    with pytest.raises(AssertionError):
        judge(spec, case, torch.float32, right | {result: damage(right[result])})


def test_there_are_enough_mutants():
    assert len(FORMULAS) + len(DAMAGES) + len(INTEGER_DAMAGES) >= 100
