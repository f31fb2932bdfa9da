# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against the definitions worked out by hand, and against published values."""

import math

import pytest
import torch
from cases import CASES, Case
from published import CALIBRATION
from specs import SPECS, oracle, pairs
from tolerance import Tolerance, check_close, unit_error

from unipool import reference
from unipool.ops import Routing

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def test_norm_topk_by_hand():
    """||(3, -4, 0)|| = 5: s = 2 * 10 * (0.6, 0, 0)."""
    z = torch.tensor([[3.0, -4.0, 0.0]], dtype=F64)
    r = reference.norm_topk(z, torch.tensor(2.0, dtype=F64), 2, calibration=10.0, eps=0.0)
    assert r.weights.tolist() == [[12.0, 0.0]]
    assert r.experts.tolist() == [[0, -1]]
    assert r.load.tolist() == [1, 0, 0]
    assert r.importance.tolist() == [12.0, 0.0, 0.0]


def test_softmax_topk_by_hand():
    z = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64).log()
    r = reference.softmax_topk(z, 2)
    torch.testing.assert_close(r.weights, torch.tensor([[4 / 7, 2 / 7]], dtype=F64))
    assert r.experts.tolist() == [[2, 1]]
    r = reference.softmax_topk(z, 2, renormalize=True)
    torch.testing.assert_close(r.weights, torch.tensor([[2 / 3, 1 / 3]], dtype=F64))


def test_choice_puts_nan_first_and_ties_in_id_order():
    z = torch.tensor([[1.0, torch.nan, 1.0, 2.0]])
    assert reference.norm_topk(z, torch.tensor(1.0), 4).experts.tolist() == [[0, 1, 2, 3]]
    bias = torch.tensor([0.0, 0.0, 0.0, torch.nan])
    r = reference.norm_topk(torch.ones(1, 4), torch.tensor(1.0), 3, bias=bias)
    assert r.experts.tolist() == [[3, 0, 1]]


def test_dispatch_plan_by_hand():
    ids = torch.tensor([[2, 0], [2, 7], [-1, 0]], dtype=torch.int32)
    p = reference.dispatch_plan(ids, 3)
    assert p.order.tolist() == [1, 5, 0, 2, -1, -1]
    assert p.inverse.tolist() == [[2, 0], [3, -1], [-1, 1]]
    assert p.offsets.tolist() == [0, 2, 2, 4]


def test_expert_mlp_agrees_with_the_sum_over_all_experts():
    """(8) as a dense sum: every expert on every token, with the weight of unchosen ones 0."""
    case = Case("dense", 11, 4, 2, 6, 5, routing="dropped")
    spec = next(s for s in SPECS if s.name == "expert_mlp")
    i = spec.inputs(case, F64)
    dense = torch.zeros(11, 4, dtype=F64)
    for t, j in torch.cartesian_prod(torch.arange(11), torch.arange(2)).tolist():
        e = int(i["experts"][t, j])
        if 0 <= e < 4:
            dense[t, e] += i["weights"][t, j]
    gate, up = torch.einsum("td,efd->tef", i["x"], i["gate_up"]).chunk(2, -1)
    rows = torch.einsum("tef,edf->ted", gate * torch.sigmoid(gate) * up, i["down"])
    y = torch.einsum("te,ted->td", dense, rows)
    routing = Routing(i["weights"], i["experts"], None, None)
    got = reference.expert_mlp(i["x"], routing, i["gate_up"], i["down"])
    torch.testing.assert_close(got, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_result_types(dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    z = torch.randn(4, 6).to(dtype)
    r = reference.softmax_topk(z, 2)
    assert [t.dtype for t in r] == [acc, torch.int32, torch.int32, acc]
    p = reference.dispatch_plan(r.experts, 6)
    assert all(t.dtype == torch.int32 for t in p)
    assert reference.unpermute(reference.permute(z, p), p, r.weights).dtype == dtype


@pytest.mark.parametrize(
    ("spec", "case"), pairs(SPECS, [c for c in CASES if c.tokens > 1]), ids=str
)
def test_results_are_of_order_1(spec, case):
    """Absolute errors are judged by the size of the results; that only works if they have one."""
    for name, value in oracle(spec, case, spec.inputs(case, F64)).items():
        if value is not None and value.is_floating_point() and case.routing != "none":
            largest = value.abs().max()
            assert 0.01 < largest < 10_000, f"{name}: {largest}"


# --- calibration and loss


@pytest.mark.parametrize(("M", "k", "value"), CALIBRATION)
def test_calibration_agrees_with_the_published_values(M, k, value):
    """To the two decimals given, and four standard errors (0.2 / sqrt(draws) relative)."""
    draws = 1 << 15
    got = reference.norm_router_calibration(M, k, draws=draws)
    assert abs(got - value) < 0.005 + 4 * 0.2 * value / math.sqrt(draws)


def test_calibration_of_one_expert_is_one():
    """g / |g| of the positive draws is 1, whatever g."""
    assert reference.norm_router_calibration(1, 1, draws=1000) == 1.0


def routing_of(load: list[int], importance: list[float], tokens: int, k: int) -> Routing:
    return Routing(
        torch.zeros(tokens, k),
        torch.zeros(tokens, k, dtype=torch.int32),
        torch.tensor(load, dtype=torch.int32),
        torch.tensor(importance, dtype=F64, requires_grad=True),
    )


def test_balance_loss_by_hand():
    """M = 2, L = 2, T = 4, k = 1: f = (5/8, 3/8), P = (6/8, 2/8), loss = a * 2 * (30 + 6) / 64."""
    layers = [routing_of([4, 0], [4.0, 0.0], 4, 1), routing_of([1, 3], [2.0, 2.0], 4, 1)]
    loss = reference.balance_loss(layers, 1, 0.1)
    torch.testing.assert_close(loss.item(), 0.1 * 2 * 36 / 64)
    loss.backward()
    for layer in layers:
        due = torch.tensor([0.1 * 2 * 5 / 8 / 8, 0.1 * 2 * 3 / 8 / 8], dtype=F64)
        torch.testing.assert_close(layer.importance.grad, due)
    earlier = torch.tensor([0.0, 1.0], dtype=F64)
    delayed = reference.balance_loss(layers, 1, 0.1, fraction=earlier)
    torch.testing.assert_close(delayed.item(), 0.1 * 2 * 2 / 8)


def test_balance_loss_is_the_coefficient_at_perfect_balance():
    layers = [routing_of([3, 3, 3, 3], [1.5] * 4, 6, 2)]
    torch.testing.assert_close(reference.balance_loss(layers, 2, 0.02).item(), 0.02)
    concentrated = [routing_of([6, 6, 0, 0], [3.0, 3.0, 0, 0], 6, 2)]
    torch.testing.assert_close(reference.balance_loss(concentrated, 2, 0.02).item(), 0.04)


# --- the checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bounds_accept_rounding_and_reject_four_times_as_much(dtype):
    exact = torch.randn(200, 64, dtype=F64)
    tolerance = Tolerance(64, 1)
    check_close(exact.to(dtype), exact, tolerance, dtype)
    noise = 4 * unit_error(tolerance, dtype) * torch.randn_like(exact)
    with pytest.raises(AssertionError, match=r"off by|L2"):
        check_close((exact * (1 + noise)).to(dtype), exact, tolerance, dtype)
