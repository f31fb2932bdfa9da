# SPDX-License-Identifier: Apache-2.0
"""expert_mlp against the oracle, and at the edges of its contract."""

import pytest
import torch
from cases import BY_NAME, Case, acc_dtype, plan, rand
from specs import EXPERT_MLP, oracle, pairs, run, to_device
from suite import EXPERT_SIZES, check_against_oracle, check_empty_experts, check_group_sizes
from tolerance import Tolerance, check_close, check_results

from unipool import ops, reference


@pytest.mark.parametrize(("spec", "case"), pairs([EXPERT_MLP]), ids=str)
def test_expert_mlp_forward_backward(spec, case, dtype, device):
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize(("T", "M", "k", "D", "F"), EXPERT_SIZES)
def test_expert_mlp_adversarial_sizes(T, M, k, D, F, dtype, device):
    case = Case(f"{T}x{M}x{k}x{D}x{F}", T, M, k, D, F)
    check_against_oracle(EXPERT_MLP, case, dtype, device)


def test_expert_mlp_of_every_group_size_up_to_70(dtype, device):
    check_group_sizes(EXPERT_MLP, dtype, device)


def test_expert_mlp_gives_experts_without_tokens_exactly_zero(dtype, device, poisoned_memory):
    check_empty_experts(EXPERT_MLP, ("grad_gate_up", "grad_down"), dtype, device)


@pytest.mark.parametrize("e", [0, 3, 7])
def test_nan_in_one_expert_changes_only_its_tokens(e, dtype, device):
    case = Case("nan_expert", 60, 8, 2, 16, 8)
    inputs = to_device(EXPERT_MLP.inputs(case, dtype), device)
    clean = run(EXPERT_MLP, case, ops, inputs)
    for name in ("gate_up", "down"):
        poisoned = dict(inputs)
        poisoned[name] = inputs[name].clone()
        poisoned[name][e] = torch.nan
        got = run(EXPERT_MLP, case, ops, poisoned)
        touched = inputs["experts"].eq(e).any(1)
        assert 0 < int(touched.sum()) < case.tokens
        for result in ("y", "grad_x", "grad_weights"):
            assert torch.equal(got[result][~touched], clean[result][~touched]), result
        assert got["y"][touched].isnan().all()
        others = torch.arange(8, device=device) != e
        for result in ("grad_gate_up", "grad_down"):
            assert torch.equal(got[result][others], clean[result][others]), result


def test_one_nan_token_changes_only_itself(dtype, device):
    case = Case("nan_token", 60, 8, 2, 16, 8)
    inputs = to_device(EXPERT_MLP.inputs(case, dtype), device)
    clean = run(EXPERT_MLP, case, ops, inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][11] = torch.nan
    got = run(EXPERT_MLP, case, ops, inputs)
    others = torch.arange(60, device=device) != 11
    for result in ("y", "grad_x", "grad_weights"):
        assert torch.equal(got[result][others], clean[result][others]), result
    assert got["y"][11].isnan().all()


@pytest.mark.parametrize("case", ["dropped", "all_dropped"])
def test_a_dropped_slot_adds_nothing(case, dtype, device):
    """Its weight may be NaN, and a token with no slot left may be NaN."""
    case = BY_NAME[case]
    inputs = to_device(EXPERT_MLP.inputs(case, dtype), device)
    clean = run(EXPERT_MLP, case, ops, inputs)
    ids = inputs["experts"]
    dropped = (ids < 0) | (ids >= case.experts)
    lost = dropped.all(1)
    assert lost.any()
    inputs["weights"] = inputs["weights"].masked_fill(dropped, torch.nan)
    inputs["x"] = inputs["x"].masked_fill(lost.unsqueeze(1), torch.nan)
    got = run(EXPERT_MLP, case, ops, inputs)
    for name, due in clean.items():
        assert torch.equal(got[name], due), name
    assert got["y"][lost].eq(0).all()
    assert got["grad_x"][lost].eq(0).all()
    assert got["grad_weights"][dropped].eq(0).all()


def test_expert_mlp_is_the_composition_of_the_other_ops(dtype, device):
    case = BY_NAME["M_not_pow2"]
    i = to_device(EXPERT_MLP.inputs(case, dtype), device)
    p = ops.dispatch_plan(i["experts"], case.experts)
    gate, up = ops.grouped_mm(ops.permute(i["x"], p), i["gate_up"], p.offsets).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate.to(i["weights"].dtype)) * up
    rows = ops.grouped_mm(hidden.to(dtype), i["down"], p.offsets)
    y = ops.unpermute(rows, p, i["weights"])
    routing = ops.Routing(i["weights"], i["experts"], None, None)
    fused = ops.expert_mlp(i["x"], routing, i["gate_up"], i["down"])
    tolerance = Tolerance(2 * (case.d_model + case.d_ff), 8)
    check_close(fused, y.cpu().double(), tolerance, dtype)


def test_saturated_gates(dtype, device):
    """silu of +-1e4 (1e3 where float16 would overflow): the sigmoid does on neither side."""
    case = Case("saturated", 12, 2, 1, 8, 4)
    inputs = to_device(EXPERT_MLP.inputs(case, dtype), device)
    gate_up = inputs["gate_up"].clone()
    gate_up[:, :4] *= 1e3 if dtype == torch.float16 else 1e4
    got = run(EXPERT_MLP, case, ops, inputs | {"gate_up": gate_up})
    for name, value in got.items():
        assert value.isfinite().all(), name


def test_gate_rows_come_first(dtype, device):
    """One expert, D = F = 1, written out: silu(2 * 3) * (5 * 3) * 7 * 0.5."""
    one = {"dtype": dtype, "device": device}
    x = torch.tensor([[3.0]], **one)
    gate_up, down = torch.tensor([[[2.0], [5.0]]], **one), torch.tensor([[[7.0]]], **one)
    w = torch.tensor([[0.5]], dtype=acc_dtype(dtype), device=device)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    y = ops.expert_mlp(x, ops.Routing(w, ids, None, None), gate_up, down)
    due = 6 / (1 + torch.tensor(-6.0, dtype=torch.float64).exp()) * 15 * 7 * 0.5
    check_close(y, due.view(1, 1), Tolerance(3, 4), dtype)


def test_a_token_may_name_one_expert_twice(dtype, device):
    case = Case("twice", 20, 3, 2, 8, 8)
    inputs = EXPERT_MLP.inputs(case, dtype)
    inputs["experts"][:, 1] = inputs["experts"][:, 0]
    got = run(EXPERT_MLP, case, ops, to_device(inputs, device))
    check_results(EXPERT_MLP, case, inputs, got, oracle(EXPERT_MLP, case, inputs), dtype)


def test_forward_allocates_nothing_of_the_size_of_the_pool(device):
    """Four tokens on a pool of 1024 experts (96 MB): memory follows the tokens."""
    case = Case("big_pool", 4, 1024, 2, 64, 128)
    i = to_device(EXPERT_MLP.inputs(case, torch.float32), device)
    routing = ops.Routing(i["weights"], i["experts"], None, None)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.expert_mlp(i["x"], routing, i["gate_up"], i["down"])
    usage = "device_memory_usage" if device.type == "cuda" else "cpu_memory_usage"
    allocated = sum(max(getattr(event, usage), 0) for event in profile.events())
    assert 0 < allocated < 2**20, f"{allocated} bytes"


def silu_and_grad(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.sigmoid(gate)
    return gate * s, s * (1 + gate * (1 - s))


@pytest.mark.parametrize("case", ["dropped", "ragged", "k_is_M"])
def test_raw_expert_mlp_and_backward(case, dtype, backend, device):
    """preact, hidden and grad_preact are what a deferred weight gradient will be made of."""
    case = BY_NAME[case]
    i = to_device(EXPERT_MLP.inputs(case, dtype), device)
    p = plan(case, device)
    end, F = int(p.offsets[-1]), case.d_ff
    forward = (i["x"], i["weights"], i["gate_up"], i["down"], *p)
    y, preact = backend.raw.expert_mlp(*forward, True)
    y_alone, nothing = backend.raw.expert_mlp(*forward, False)
    assert torch.equal(y, y_alone)
    assert nothing.shape == (0, 2 * F)
    assert nothing.dtype == dtype

    exact = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in i.items()}
    p_cpu = plan(case)
    x_rows = reference.permute(exact["x"], p_cpu)
    z = reference.grouped_mm(x_rows, exact["gate_up"], p_cpu.offsets)
    check_close(preact[:end], z[:end], Tolerance(case.d_model, 1), dtype, "preact")

    grad = rand(case, "grad", *y.shape).to(y)
    got = backend.raw.expert_mlp_bwd(grad, *forward[1:], preact)
    slots = p_cpu.order[:end].long()
    w = exact["weights"].flatten()[slots].unsqueeze(1)
    gate, up = z[:end].chunk(2, -1)
    act, slope = silu_and_grad(gate)
    grad_rows = reference.permute(grad.cpu().double(), p_cpu)
    d_hidden = w * reference.grouped_mm(grad_rows, exact["down"].mT, p_cpu.offsets)[:end]
    due_preact = torch.cat([d_hidden * up * slope, d_hidden * act], -1)
    sums = Tolerance(2 * (case.d_model + F), 5)
    check_close(got[2][:end], due_preact, sums, dtype, "grad_preact")
    check_close(got[3][:end], w * act * up, sums, dtype, "hidden")
    assert got[2].shape == (p.order.numel(), 2 * F)
    assert got[3].shape == (p.order.numel(), F)

    grad_x, grad_weights, hidden = backend.raw.expert_mlp_bwd_(grad, *forward[1:], preact)
    in_place = (grad_x, grad_weights, preact, hidden)
    assert all(torch.equal(a, b) for a, b in zip(in_place, got, strict=True))
