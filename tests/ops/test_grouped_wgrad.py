# SPDX-License-Identifier: Apache-2.0
"""The weight gradient over all segments of a pass against the oracle."""

import pytest
import torch
from cases import Case, acc_dtype, expert_ids, rand
from tolerance import Tolerance, check_close

from unipool import reference


def wgrad_problem(segments: int, gather_grad: bool, gather_input: bool, dtype, device):
    """Arguments of grouped_wgrad for segments of different lengths, and the float64 result."""
    M, k, n, K = 12, 2, 10, 7
    grads, inputs, orders, offsets = [], [], [], []
    due = torch.zeros(M, n, K, dtype=torch.float64)
    for layer, T in enumerate([37, 0, 90][:segments]):
        case = Case("wgrad", T, M - 3, k, K, n, "dropped", seed=layer)
        p = reference.dispatch_plan(expert_ids(case), M)  # the last experts get nothing
        g = rand(case, "g", T if gather_grad else T * k, n).to(dtype)
        x = rand(case, "x", T if gather_input else T * k, K).to(dtype)
        g_rows = reference.permute(g, p) if gather_grad else g
        x_rows = reference.permute(x, p) if gather_input else x
        for e in range(M):
            rows = slice(int(p.offsets[e]), int(p.offsets[e + 1]))
            due[e] += g_rows[rows].double().T @ x_rows[rows].double()
        grads.append(g.to(device))
        inputs.append(x.to(device))
        orders.append(p.order.to(device))
        offsets.append(p.offsets.to(device))
    orders = orders if gather_grad or gather_input else []
    return (grads, inputs, orders, offsets, k * gather_grad, k * gather_input), due


GATHERED = [(False, False), (False, True), (True, False)]


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("gather_grad", "gather_input"), GATHERED)
def test_raw_grouped_wgrad(segments, gather_grad, gather_input, dtype, backend, device):
    """Summed over segments; either operand gathered from tokens or in sorted rows."""
    arguments, due = wgrad_problem(segments, gather_grad, gather_input, dtype, device)
    assert due.flatten(1).eq(0).all(1).any(), "an expert without rows belongs to the problem"
    got = backend.raw.grouped_wgrad(*arguments)
    assert got.dtype == dtype
    check_close(got, due, Tolerance(300, 1), dtype)
    in_acc = backend.raw.grouped_wgrad(*arguments, acc_dtype(dtype))
    assert in_acc.dtype == acc_dtype(dtype)
    check_close(in_acc, due, Tolerance(300, 0), dtype)


@pytest.mark.parametrize(("gather_grad", "gather_input"), GATHERED)
def test_raw_grouped_wgrad_in_place(gather_grad, gather_input, dtype, backend, device):
    """Adds to the sum; an expert without rows is not even read."""
    arguments, due = wgrad_problem(3, gather_grad, gather_input, dtype, device)
    empty = due.flatten(1).eq(0).all(1)
    start = torch.ones(due.shape, dtype=acc_dtype(dtype))
    start[empty] = torch.nan
    total = start.to(device)
    for passes in (1, 2):
        backend.raw.grouped_wgrad_(total, *arguments)
        assert total[empty].isnan().all()
        check_close(total[~empty], 1 + passes * due[~empty], Tolerance(600, 0), dtype)


def test_raw_grouped_wgrad_of_more_segments_than_one_launch_takes(dtype, backend, device):
    """Sums over launches are rounded once; an expert may have rows in the last of them only."""
    M, n, K, segments = 4, 6, 5, 259
    grads, inputs, offsets = [], [], []
    due = torch.zeros(M, n, K, dtype=torch.float64)
    for layer in range(segments):
        e = 0 if layer < segments - 2 else 2
        case = Case("many", 3, M, 1, n, K, seed=layer)
        g, x = rand(case, "g", 3, n).to(dtype), rand(case, "x", 3, K).to(dtype)
        due[e] += g.double().T @ x.double()
        grads.append(g.to(device))
        inputs.append(x.to(device))
        bounds = [0] * (e + 1) + [3] * (M - e)
        offsets.append(torch.tensor(bounds, dtype=torch.int32, device=device))
    arguments = (grads, inputs, [], offsets, 0, 0)
    got = backend.raw.grouped_wgrad(*arguments)
    assert got.dtype == dtype
    check_close(got, due, Tolerance(3 * segments, 1), dtype)
    assert got[[1, 3]].eq(0).all()
    total = torch.ones(M, n, K, dtype=acc_dtype(dtype), device=device)
    backend.raw.grouped_wgrad_(total, *arguments)
    check_close(total, 1 + due, Tolerance(3 * segments, 0), dtype)
