# SPDX-License-Identifier: Apache-2.0
"""router_logits against the oracle, and at the edges of its contract."""

import pytest
import torch
from cases import Case, acc_dtype
from specs import ROUTER_LOGITS, pairs
from suite import ROUTER_SIZES, check_against_oracle
from tolerance import check_equal

from unipool import ops


@pytest.mark.parametrize(("spec", "case"), pairs([ROUTER_LOGITS]), ids=str)
def test_logits_forward_backward(spec, case, dtype, device):
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize(("T", "M", "k"), ROUTER_SIZES)
def test_logits_adversarial_sizes(T, M, k, dtype, device):
    check_against_oracle(ROUTER_LOGITS, Case(f"{T}x{M}x{k}", T, M, k, 1, 1), dtype, device)


def logits_and_gradients(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = ops.router_logits(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad)


def test_router_logits_are_not_rounded_to_the_dtype_of_the_inputs(dtype, device):
    """1 + 2^-7 is a bfloat16, its square is none."""
    x = torch.tensor([[1 + 2**-7, 0.0]], device=device, dtype=dtype)
    assert ops.router_logits(x, x).item() == (1 + 2**-7) ** 2


def test_router_logits_take_the_whole_float32_gradient(dtype, device):
    """Of 1025 and -1024 only 0 is left if the gradient is rounded to bfloat16 or float16 first."""
    x = torch.ones(1, 3, dtype=dtype, device=device)
    weight = torch.ones(2, 3, dtype=dtype, device=device)
    grad = torch.tensor([[1024 + 2**-4, -1024.0]], device=device, dtype=acc_dtype(dtype))
    _, grad_x, _ = logits_and_gradients(x, weight, grad)
    check_equal(grad_x, torch.full_like(grad_x, 2**-4).cpu())
    _, _, grad_weight = logits_and_gradients(x.expand(2, -1), weight[:1], grad.T)
    check_equal(grad_weight, torch.full_like(grad_weight, 2**-4).cpu())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_router_logits_pass_non_finite_gradients_on(poison, dtype, device):
    """As a product does: to the token's row and to the expert's, and nowhere else."""
    case = Case("poison", 33, 20, 1, 24, 1)
    x, weight = (t.to(device) for t in ROUTER_LOGITS.inputs(case, dtype).values())
    x, weight = x.abs() + 0.25, weight.abs() + 0.25  # no factor of 0 or of another sign
    grad = torch.rand(33, 20, dtype=acc_dtype(dtype), device=device)
    _, clean_x, clean_weight = logits_and_gradients(x, weight, grad)
    grad[7, 3] = poison
    _, grad_x, grad_weight = logits_and_gradients(x, weight, grad)
    for got, clean, row in ((grad_x, clean_x, 7), (grad_weight, clean_weight, 3)):
        hit = torch.arange(got.shape[0], device=device) == row
        assert torch.equal(got[~hit], clean[~hit])
        due = torch.full_like(got[hit], poison)
        torch.testing.assert_close(got[hit], due, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_beyond_the_greatest_number_of_the_dtype_is_infinite(dtype, device):
    """float32 reaches further than bfloat16 by half a step, and further than float16 by far."""
    top = torch.finfo(acc_dtype(dtype)).max
    grad = torch.tensor([[top]], dtype=acc_dtype(dtype), device=device)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    due = torch.tensor(top, dtype=acc_dtype(dtype)).to(dtype)
    for got in logits_and_gradients(one, one, grad)[1:]:
        assert got.item() == due.item()


@pytest.mark.parametrize("experts", [1, 11, 13, 385])
def test_router_logits_are_exact_at_every_block_edge(experts, dtype, device):
    """Small integers, but for a gradient of 12 bits: every float32 sum is exact."""
    generator = torch.Generator().manual_seed(experts)
    for tokens, width in [(0, 5), (1, 1), (2, 31), (127, 33), (128, 65), (129, 257), (300, 63)]:
        x = torch.randint(-3, 4, (tokens, width), generator=generator).double()
        weight = torch.randint(-3, 4, (experts, width), generator=generator).double()
        grad = torch.randint(-2047, 2048, (tokens, experts), generator=generator).double()
        if dtype == torch.float16:
            grad = grad.remainder(16)  # its greatest number is 65504
        acc = acc_dtype(dtype)
        low = (t.to(device, kind) for t, kind in ((x, dtype), (weight, dtype), (grad, acc)))
        got = logits_and_gradients(*low)
        for t, due in zip(got, ((x @ weight.T), grad @ weight, grad.T @ x), strict=True):
            check_equal(t, due.to(t.dtype), f"{tokens}x{width}")
