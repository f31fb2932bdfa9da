# SPDX-License-Identifier: Apache-2.0
"""grouped_mm against the oracle, and at the edges of its contract."""

import pytest
import torch
from cases import BY_NAME, Case, plan, rand
from specs import GROUPED_MM, pairs, run, to_device
from suite import EXPERT_SIZES, check_against_oracle, check_empty_experts, check_group_sizes
from tolerance import Tolerance, check_close

from unipool import ops, reference


@pytest.mark.parametrize(("spec", "case"), pairs([GROUPED_MM]), ids=str)
def test_grouped_mm_forward_backward(spec, case, dtype, device):
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize(("T", "M", "k", "D", "F"), EXPERT_SIZES)
def test_grouped_mm_adversarial_sizes(T, M, k, D, F, dtype, device):
    case = Case(f"{T}x{M}x{k}x{D}x{F}", T, M, k, D, F)
    check_against_oracle(GROUPED_MM, case, dtype, device)


def test_grouped_mm_of_every_group_size_up_to_70(dtype, device):
    check_group_sizes(GROUPED_MM, dtype, device)


def test_grouped_mm_gives_experts_without_tokens_exactly_zero(dtype, device, poisoned_memory):
    check_empty_experts(GROUPED_MM, ("grad_b",), dtype, device)


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
