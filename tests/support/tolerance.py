# SPDX-License-Identifier: Apache-2.0
"""Error bounds against the float64 oracle, and the checks that apply them.

A result x^ of the ops differs from the exact x for two reasons, both relative to the size of x:

1. It is a sum of n products accumulated in the type acc (float32; float64 for float64 inputs). Each
   addition rounds by at most eps(acc) / 2; rounding errors are independent, so they add like a
   random walk: about sqrt(n) * eps(acc). Quotients, exponentials and products around the sum round
   too: 16 more steps.
2. It, or something it was computed from, was stored in the tensors' dtype r times. Each rounding is
   a relative error of at most eps(dtype) / 2 of every value. A later sum of such values grows in
   the same way as its errors do (by sqrt(n) for independent terms), so the relative error stays.

Independent errors add in quadrature:

    unit = sqrt((n + 16) * eps(acc)^2 + r * eps(dtype)^2)

The checks are then, with rows along the last axis (each element of a vector is a row):

    overall   ||x^ - x||_2  <=  unit * (1 + 2 / sqrt(numel)) * ||x||_2
                                                        (typically 0.3 unit; few numbers vary more)
    per row   |x^ - x|      <=  4 * unit * |x_row|_max  (the largest of many such errors)

A row that is exactly zero must be exactly zero. Else a row counts as at least 1/8 of the largest
one, since a small row is often a sum that cancels; where one token or expert is all there is, or
where a formula cancels by construction (maybe to zero), the tolerance says what magnitude it
cancels from. Integers must be equal. A missing gradient is a failure.
"""

import torch
from cases import Case, acc_dtype
from specs import OpSpec, Tolerance
from torch import Tensor

PER_ROW = 4.0
SMALL_ROW = 1 / 8
ELEMENTWISE = 16


def unit_error(tolerance: Tolerance, dtype: torch.dtype) -> float:
    acc, stored = torch.finfo(acc_dtype(dtype)).eps, torch.finfo(dtype).eps
    steps = tolerance.reduction + ELEMENTWISE
    return (steps * acc**2 + tolerance.roundings * stored**2) ** 0.5


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, 1) if t.dim() <= 1 else t.reshape(-1, t.shape[-1])


def check_close(
    actual: Tensor | None,
    expected: Tensor,
    tolerance: Tolerance,
    dtype: torch.dtype,
    name: str = "result",
    magnitude: Tensor | float = 0.0,
) -> None:
    """actual: from the op (None fails); expected: float64; magnitude: of all rows, or [rows]."""
    assert actual is not None, f"{name}: missing"
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    if expected.numel() == 0:
        return
    got, want = _rows(actual.detach().cpu().double()), _rows(expected.detach().double())
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in the wrong places"
    got, want = got.nan_to_num(0.0), want.nan_to_num(0.0)
    unit = unit_error(tolerance, dtype)
    error = (got - want).abs()

    row_max = want.abs().amax(1)
    floor = magnitude  # of each row; one number for all rows is of those that are not zero
    if not isinstance(floor, Tensor):
        floor = torch.where(row_max > 0, floor, 0.0).double()
    size = torch.where(row_max > 0, row_max.clamp(min=SMALL_ROW * row_max.max()), 0.0)
    size = size.maximum(floor)
    excess = error.amax(1) - PER_ROW * unit * size
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{name}: row {worst} is off by {error[worst].max():.3g}, "
        f"allowed {PER_ROW * unit * size[worst]:.3g} (row maximum {row_max[worst]:.3g})"
    )
    norm = want.norm().maximum(floor.norm())
    allowed = unit * (1 + 2 / want.numel() ** 0.5)
    assert error.norm() <= allowed * norm, (
        f"{name}: relative L2 error {error.norm() / norm:.3g}, allowed {allowed:.3g}"
    )


def check_equal(actual: Tensor | None, expected: Tensor, name: str = "result") -> None:
    """Integer results: same dtype, shape and values."""
    assert actual is not None, f"{name}: missing"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    wrong = (actual.cpu() != expected.cpu()).nonzero()
    first = wrong[:1].tolist()
    assert not first, f"{name}: {wrong.shape[0]} wrong values, first at {first}"


def check_results(
    spec: OpSpec,
    case: Case,
    inputs: dict[str, Tensor],
    actual: dict[str, Tensor | None],
    expected: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """All results and gradients of an op (as specs.run gives them) against specs.oracle."""
    tolerances = spec.tolerances(case)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if want is None or not want.is_floating_point():
            check_equal(actual[name], want, name)
            continue
        got = actual[name]
        assert got is not None, f"{name}: missing"
        if name.startswith("grad_"):
            due = inputs[name.removeprefix("grad_")].dtype
        else:
            due = acc_dtype(dtype) if name in ("logits", "weights", "importance") else dtype
        assert got.dtype == due, f"{name}: {got.dtype}, expected {due}"
        tolerance = tolerances[name]
        magnitude = tolerance.magnitude
        if callable(magnitude):
            magnitude = magnitude({n: t.cpu() for n, t in inputs.items()})
        check_close(got, want, tolerance, dtype, name, magnitude)
