# SPDX-License-Identifier: Apache-2.0
"""dispatch_plan, permute and unpermute against the oracle, and at the edges of their contract."""

import pytest
import torch
from cases import BY_NAME, CASES, Case, expert_ids, plan, rand, weights
from specs import DISPATCH_SPECS, PERMUTE, UNPERMUTE_WEIGHTED, pairs
from suite import check_against_oracle
from tolerance import Tolerance, check_close, check_equal

from unipool import ops, reference


def check_plan(got: ops.DispatchPlan, due: ops.DispatchPlan) -> None:
    for name in due._fields:
        check_equal(getattr(got, name), getattr(due, name), name)


@pytest.mark.parametrize(("spec", "case"), pairs(DISPATCH_SPECS), ids=str)
def test_dispatch_forward_backward(spec, case, dtype, device):
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize("spec", [PERMUTE, UNPERMUTE_WEIGHTED], ids=str)
@pytest.mark.parametrize(
    ("T", "M", "k", "D"),
    [(1, 1, 1, 1), (127, 3, 2, 7), (128, 96, 1, 33), (129, 160, 8, 100), (5, 16, 16, 1025)],
)
def test_dispatch_adversarial_sizes(spec, T, M, k, D, dtype, device):
    check_against_oracle(spec, Case(f"{T}x{M}x{k}x{D}", T, M, k, D, 1), dtype, device)


@pytest.mark.parametrize("T", [0, 1, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 8193])
@pytest.mark.parametrize("M", [1, 3, 96, 384, 1024])
def test_plan_sizes(T, M, device):
    k = min(M, 2)
    case = Case("plan", T, M, k, 1, 1, routing="zipf")
    ids = expert_ids(case)
    check_plan(ops.dispatch_plan(ids.to(device), M), reference.dispatch_plan(ids, M))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_is_a_stable_permutation_of_the_kept_slots(case, device):
    """Checked from the definition, without the reference."""
    ids = expert_ids(case)
    order, inverse, offsets = (t.cpu() for t in ops.dispatch_plan(ids.to(device), case.experts))
    flat = ids.flatten()
    kept = ((flat >= 0) & (flat < case.experts)).nonzero().flatten()
    end = int(offsets[-1])
    assert end == kept.numel()
    assert order[:end].sort().values.tolist() == kept.tolist(), "each kept slot once"
    assert order[end:].eq(-1).all()
    for e in range(case.experts):
        rows = order[offsets[e] : offsets[e + 1]]
        assert flat[rows.long()].eq(e).all()
        assert rows.diff().gt(0).all(), "slots of an expert stay in order"
    flat_inverse = inverse.flatten()
    assert torch.equal(order[flat_inverse[kept].long()], kept.int())
    assert flat_inverse[~torch.isin(torch.arange(flat.numel()), kept)].eq(-1).all()


@pytest.mark.parametrize("lengths", [[5], [4, 0, 9], [0, 0], [64, 64, 64], [1] * 20])
def test_plan_of_several_layers(lengths, device):
    layers = [expert_ids(Case("l", T, 12, 2, 1, 1, "dropped"), i) for i, T in enumerate(lengths)]
    got = ops.dispatch_plan([t.to(device) for t in layers], 12)
    check_plan(got, reference.dispatch_plan(layers, 12))
    check_plan(got, ops.dispatch_plan(torch.cat(layers).to(device), 12))
    x = rand(Case("l", sum(lengths), 12, 2, 8, 1), "x", sum(lengths), 8)
    rows = ops.permute(x.float().to(device), got)
    check_equal(rows, reference.permute(x.float(), reference.dispatch_plan(layers, 12)))


@pytest.mark.parametrize("bad_id", [-1, -7, -(2**31), 12, 13, 2**31 - 1])
def test_any_id_outside_the_pool_is_dropped(bad_id, device):
    ids = torch.tensor([[0, bad_id], [bad_id, 11], [3, 4]], dtype=torch.int32)
    got = ops.dispatch_plan(ids.to(device), 12)
    assert got.inverse.cpu().tolist() == [[0, -1], [-1, 3], [1, 2]]
    assert got.order.cpu().tolist() == [0, 4, 5, 3, -1, -1]
    assert int(got.offsets[-1]) == 4


def test_a_token_may_name_one_expert_twice(device):
    """top-k never does, but a caller's own routing may; both slots get a row."""
    ids = torch.tensor([[2, 2], [2, 0]], dtype=torch.int32)
    got = ops.dispatch_plan(ids.to(device), 3)
    check_plan(got, reference.dispatch_plan(ids, 3))
    x = torch.eye(2, device=device)
    torch.testing.assert_close(ops.unpermute(ops.permute(x, got), got), 2 * x)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpermute_of_permute_multiplies_by_the_kept_slots(case, dtype, device):
    """Exact in every dtype: x is a small integer."""
    x = rand(case, "x", case.tokens, case.d_model).mul(4).round().to(device, dtype)
    p = plan(case, device)
    kept = (p.inverse >= 0).sum(1, keepdim=True).to(dtype)
    assert torch.equal(ops.unpermute(ops.permute(x, p), p), x * kept)


@pytest.mark.parametrize("case", ["dropped", "all_dropped"])
def test_rows_past_the_end_are_zero_and_never_read(case, dtype, device):
    case = BY_NAME[case]
    p = plan(case, device)
    end = int(p.offsets[-1])
    x = rand(case, "x", case.tokens, case.d_model).to(device, dtype)
    lost = (p.inverse < 0).all(1)
    x[lost] = torch.nan
    rows = ops.permute(x, p)
    assert rows[end:].eq(0).all()
    assert rows[:end].isfinite().all()

    y = rand(case, "y", p.order.numel(), case.d_model).to(device, dtype)
    w = weights(case, dtype).to(device)
    due = ops.unpermute(y, p, w)
    y[end:] = torch.nan
    w = w.masked_fill(p.inverse < 0, torch.nan)
    y.requires_grad_()
    w.requires_grad_()
    out = ops.unpermute(y, p, w)
    assert torch.equal(out, due)
    assert out[lost].eq(0).all()
    out.backward(torch.ones_like(out))
    assert y.grad[end:].eq(0).all()
    assert y.grad.isfinite().all()
    assert w.grad[p.inverse < 0].eq(0).all()
    assert w.grad.isfinite().all()

    leaf = torch.zeros_like(x).requires_grad_()
    grad = torch.ones_like(rows)
    grad[end:] = torch.nan
    ops.permute(leaf, p).backward(grad)
    assert leaf.grad.isfinite().all()
    assert leaf.grad[lost].eq(0).all()


def test_sums_of_many_slots_are_accumulated_in_float32(device):
    """bfloat16: 1 + 15 * 2^-8 loses every term if the running sum is rounded to bfloat16."""
    ids = torch.arange(16, dtype=torch.int32).expand(3, 16).contiguous()
    p = ops.dispatch_plan(ids.to(device), 16)
    y = torch.full((48, 4), 2.0**-8, dtype=torch.bfloat16, device=device)
    y[:3] = 1.0  # the rows of expert 0 are summed first
    due = torch.full((3, 4), 1 + 15 * 2.0**-8, device=device).bfloat16()
    assert torch.equal(ops.unpermute(y, p), due)
    x = torch.zeros(3, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    ops.permute(x, p).backward(y)
    assert torch.equal(x.grad, due)


def test_combine_does_not_overflow_on_the_way(device):
    """The weight is applied before the sum: 1e38 + 1e38 + 1e38 + 1e38 would be inf."""
    ids = torch.arange(4, dtype=torch.int32, device=device).unsqueeze(0)
    p = ops.dispatch_plan(ids, 4)
    y = torch.full((4, 3), 1e38, device=device)
    w = torch.full((1, 4), 0.25, device=device)
    torch.testing.assert_close(ops.unpermute(y, p, w), y[:1])


def test_plan_is_not_differentiable_and_needs_no_grad(device):
    ids = torch.zeros(4, 1, dtype=torch.int32, device=device)
    for t in ops.dispatch_plan(ids, 3):
        assert not t.requires_grad
        assert t.dtype == torch.int32


def test_gradients_of_distinct_rows_stay_apart(backend, device):
    """Row r of the upstream gradient is filled with r; each must come back to its own token."""
    case = BY_NAME["ragged"]
    p = plan(case, device)
    n = p.order.numel()
    widest = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    x = torch.zeros(case.tokens, 3, dtype=widest, device=device, requires_grad=True)
    grad = torch.arange(n, device=device, dtype=x.dtype).unsqueeze(1).expand(n, 3)
    ops.permute(x, p).backward(grad)
    due = p.inverse.cpu().double().sum(1, keepdim=True).expand(-1, 3)
    check_close(x.grad, due, Tolerance(case.top_k, 1), x.dtype)
