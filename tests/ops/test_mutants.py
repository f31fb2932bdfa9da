# SPDX-License-Identifier: Apache-2.0
"""Wrong formulas that the bounds must reject, and the right ones, which they must not."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from mutants import CASES, DTYPES, FORMULAS, judge, problem, unpermute
from specs import UNPERMUTE, OpSpec, run

pytestmark = pytest.mark.usefixtures("one_thread")


RIGHT = list(dict.fromkeys(row[:3] for row in FORMULAS))


def results_of(spec: OpSpec, case: str, dtype: torch.dtype, formula: Callable, fault) -> dict:
    def wrong(*args: object, **options: object) -> object:
        return formula(*args, **options, fault=fault)

    module = SimpleNamespace(**{formula.__name__: wrong})
    return run(spec, CASES[case], module, problem(spec, case, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("spec", "case", "formula", "fault"),
    FORMULAS,
    ids=[f"{spec}-{fault}" for spec, _, _, fault in FORMULAS],
)
def test_a_wrong_formula_is_rejected(spec, case, formula, fault, dtype):
    wrong = results_of(spec, case, dtype, formula, fault)
    with pytest.raises(AssertionError):
        judge(spec, case, dtype, wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("spec", "case", "formula"),
    RIGHT,
    ids=[f"{spec}-{case}" for spec, case, _ in RIGHT],
)
def test_the_formula_without_a_fault_passes(spec, case, formula, dtype):
    """Else a mutant might be rejected for a reason that is none of its own."""
    judge(spec, case, dtype, results_of(spec, case, dtype, formula, None))


def test_a_running_sum_in_bfloat16_is_rejected():
    """Told from float32 inputs: a bfloat16 result hides it behind its own rounding (the op's own
    accumulation in bfloat16 is tested with exact numbers in test_dispatch.py)."""
    wrong = results_of(UNPERMUTE, "k_is_M", torch.float32, unpermute, "sum_rounded_at_each_step")
    with pytest.raises(AssertionError):
        judge(UNPERMUTE, "k_is_M", torch.float32, wrong)
