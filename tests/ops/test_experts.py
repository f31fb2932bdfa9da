# SPDX-License-Identifier: Apache-2.0
"""grouped_mm and expert_mlp against the oracle, and at the edges of their contract."""

import pytest
import torch
from cases import (
    BY_NAME,
    EXPERT_MLP,
    EXPERT_SPECS,
    GROUPED_MM,
    Case,
    acc_dtype,
    expert_ids,
    oracle,
    pairs,
    plan,
    rand,
    run,
    to_device,
)
from tolerance import Tolerance, check_close, check_results

from unipool import ops, reference


def check_against_oracle(spec, case, dtype, device):
    inputs = spec.inputs(case, dtype)
    actual = run(spec, case, ops, to_device(inputs, device))
    check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)


@pytest.mark.parametrize(("spec", "case"), pairs(EXPERT_SPECS), ids=str)
def test_experts_forward_backward(spec, case, dtype, device):
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
@pytest.mark.parametrize(
    ("T", "M", "k", "D", "F"),
    [
        (1, 1, 1, 1, 1),
        (1, 3, 3, 7, 5),
        (127, 3, 1, 33, 7),
        (128, 3, 2, 64, 32),
        (129, 2, 1, 100, 36),
        (5, 8, 8, 17, 130),
        (9, 1, 1, 1025, 3),
        (33, 16, 16, 8, 8),
        (70, 4, 2, 48, 257),
    ],
)
def test_experts_adversarial_sizes(spec, T, M, k, D, F, dtype, device):
    check_against_oracle(spec, Case(f"{T}x{M}x{k}x{D}x{F}", T, M, k, D, F), dtype, device)


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
def test_every_group_size_up_to_70(spec, dtype, device):
    """One expert with n rows for each n, beside one with a few: block edges of the products."""
    for T in range(1, 71, 3):
        case = Case(f"group{T}", T, 2, 1, 24, 40, routing="one")
        check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
def test_experts_without_tokens_get_exactly_zero(spec, dtype, device, poisoned_memory):
    case = BY_NAME["ragged"]
    inputs = spec.inputs(case, dtype)
    got = run(spec, case, ops, to_device(inputs, device))
    counts = plan(case).offsets.diff()
    empty = (counts == 0).nonzero().flatten()
    assert 10 < empty.numel() < case.experts, "the case must have empty experts"
    for name in ("grad_b", "grad_gate_up", "grad_down"):
        if name in got:
            per_expert = got[name].cpu().flatten(1)
            assert per_expert[empty].eq(0).all(), name
            assert per_expert[counts > 0].ne(0).any(1).all(), name


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


def test_grouped_mm_never_reads_rows_past_the_end(dtype, device):
    case = BY_NAME["dropped"]
    inputs = to_device(GROUPED_MM.inputs(case, dtype), device)
    clean = run(GROUPED_MM, case, ops, inputs)
    end = int(inputs["offsets"][-1])
    inputs["a"] = inputs["a"].clone()
    inputs["a"][end:] = torch.nan
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    out = ops.grouped_mm(a, b, inputs["offsets"])
    assert torch.equal(out, clean["out"])
    assert out[end:].eq(0).all()
    assert end < out.shape[0]
    grad = rand(case, "grad", *out.shape).to(out)
    grad[end:] = torch.nan
    out.backward(grad)
    assert a.grad[end:].eq(0).all()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


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


@pytest.mark.parametrize("case", ["ragged", "dropped", "M_not_pow2", "bench_small"])
def test_products_of_small_integers_are_exact(case, dtype, device):
    """Sums of integers below 2^24 are exact in float32: the result is the float64 one, rounded."""
    case = BY_NAME[case]
    inputs = GROUPED_MM.inputs(case, dtype)
    for name in ("a", "b"):
        inputs[name] = (
            torch.randint(-4, 5, inputs[name].shape, generator=case.generator("int", name))
        ).to(dtype)
    a, b, offsets = (inputs[n].to(device) for n in ("a", "b", "offsets"))
    due = reference.grouped_mm(inputs["a"].double(), inputs["b"].double(), inputs["offsets"])
    assert due.abs().max() < 2**24
    assert torch.equal(ops.grouped_mm(a, b, offsets).cpu(), due.to(dtype))


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


# --- raw ops that no public function shows by itself


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


def test_more_experts_than_the_kernels_take(backend, device):
    if backend.name == "cpu":
        pytest.skip("the CPU has no limit")
    a, b = torch.zeros(0, 8, device=device), torch.zeros(1025, 8, 8, device=device)
    offsets = torch.zeros(1026, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"^grouped_mm: b must have at most 1024 experts"):
        backend.raw.grouped_mm(a, b, offsets)


def test_raw_grouped_mm_bwd_a(dtype, backend, device):
    case = BY_NAME["dropped"]
    p = plan(case)
    grad = rand(case, "g", case.tokens * case.top_k, case.d_ff).to(dtype)
    b = rand(case, "b", case.experts, case.d_ff, case.d_model, std=case.d_ff**-0.5).to(dtype)
    got = backend.raw.grouped_mm_bwd_a(grad.to(device), b.to(device), p.offsets.to(device))
    due = reference.grouped_mm(grad.double(), b.double().mT, p.offsets)
    check_close(got, due, Tolerance(case.d_ff, 1), dtype)


def test_ids_of_the_cases_are_what_their_names_say():
    assert expert_ids(BY_NAME["all_to_one_expert"]).eq(4).all()
    assert expert_ids(BY_NAME["k_is_M"]).sort(1).values.eq(torch.arange(16)).all()
    dropped = expert_ids(BY_NAME["dropped"])
    assert dropped.eq(-1).any()
    assert dropped.ge(3).any()
    assert dropped.eq(0).any()
