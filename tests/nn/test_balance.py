# SPDX-License-Identifier: Apache-2.0
"""PoolBalancer, docs/math.md (6)."""

import io
import math

import devices
import pytest
import torch
from modules import SharedPool, layers
from torch import Tensor

from unipool import ops, reference
from unipool.nn import (
    PoolBalancer,
)


def fraction_of(routings: list[ops.Routing]) -> Tensor:
    return reference.load_fraction(
        [ops.Routing(*(t.detach().cpu() for t in r)) for r in routings], 2
    )


def loss_of(routings: list[ops.Routing], fraction: Tensor | None = None) -> float:
    on_cpu = [ops.Routing(*(t.detach().cpu() for t in r)) for r in routings]
    return reference.balance_loss(on_cpu, 2, 0.02, fraction).item()


def balancer(device, delay: int = 1) -> PoolBalancer:
    return PoolBalancer(8, 0.02, delay=delay).to(device)


def test_balance_without_delay_uses_this_call(device):
    module = balancer(device, delay=0)
    for seed in range(3):
        now = layers(device, seed=seed)
        assert math.isclose(module(now, 2).item(), loss_of(now), rel_tol=1e-5)


def test_balance_with_delay_uses_the_call_before(device):
    module = balancer(device)
    first, second, third = (layers(device, seed=s) for s in range(3))
    assert module(first, 2).item() == 0.0
    torch.testing.assert_close(
        module.fraction.cpu().double(), fraction_of(first), rtol=1e-6, atol=0
    )
    due = loss_of(second, fraction_of(first))
    assert math.isclose(module(second, 2).item(), due, rel_tol=1e-5)
    due = loss_of(third, fraction_of(second))
    assert math.isclose(module(third, 2).item(), due, rel_tol=1e-5)


@pytest.mark.parametrize("delay", [0, 1])
def test_balance_gradient_goes_through_importance_only(delay, device):
    module = balancer(device, delay)
    module(layers(device, seed=1), 2)
    used = module.fraction.clone()
    importance = torch.rand(8, device=device, requires_grad=True)
    routing = layers(device)[0]._replace(importance=importance)
    module([routing], 2).backward()
    fraction = used if delay == 1 else module.fraction
    torch.testing.assert_close(importance.grad, 0.02 * 8 * fraction / 20)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("delay", [0, 1])
def test_compiled_balance_agrees_with_eager(delay, compiler, device):
    """The buffer is overwritten between the loss and its backward; a compiler that reads it again
    in the backward takes the wrong fraction."""
    torch._dynamo.reset()
    module, twin = balancer(device, delay), balancer(device, delay)
    step = torch.compile(twin, backend=compiler, fullgraph=True)
    for seed in range(3):
        routing = layers(device, count=1, seed=seed)[0]
        grads = []
        for balance in (module, step):
            importance = routing.importance.detach().requires_grad_()
            loss = balance([routing._replace(importance=importance)], 2)
            loss.backward()
            grads.append((loss.detach(), importance.grad))
        for plain, compiled in zip(*grads, strict=True):
            assert torch.equal(plain, compiled)
    assert torch.equal(module.fraction, twin.fraction)


def test_snapshot_op(device):
    torch.library.opcheck(torch.ops.unipool.snapshot.default, (torch.rand(8, device=device),))


def test_the_very_first_delayed_loss_is_differentiable(device):
    routings = layers(device)
    logits = torch.randn(20, 8, device=device, requires_grad=True)
    routings[0] = ops.softmax_topk(logits, 2)
    balancer(device)(routings, 2).backward()
    assert logits.grad.eq(0).all()


def test_state_is_a_persistent_fraction(device):
    module = balancer(device)
    module(layers(device), 2)
    assert list(module.state_dict()) == ["fraction"]
    assert module.fraction.dtype == torch.float32
    assert math.isclose(module.fraction.sum().item(), 1.0, rel_tol=1e-6)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed = balancer(device)
    resumed.load_state_dict(torch.load(file))
    later = layers(device, seed=5)
    assert torch.equal(module(later, 2), resumed(later, 2))


def test_state_of_a_module_in_bfloat16_still_works(device):
    module = balancer(device).bfloat16()
    module(layers(device), 2)
    loss = module(layers(device, seed=1), 2)
    due = loss_of(layers(device, seed=1), fraction_of(layers(device)))
    assert math.isclose(loss.item(), due, rel_tol=0.02)


def test_evaluation_updates_nothing(device):
    module = balancer(device)
    module(layers(device), 2)
    before = module.fraction.clone()
    module.eval()
    with torch.no_grad():
        loss = module(layers(device, tokens=3, seed=9), 2)
    assert torch.equal(module.fraction, before)
    due = loss_of(layers(device, tokens=3, seed=9), before.cpu().double())
    assert math.isclose(loss.item(), due, rel_tol=1e-5)


def test_a_change_of_batch_size_does_not_scale_the_loss(device):
    """A fraction of tokens knows no T: the delayed loss of 5 tokens after 500 is of the same size,
    and the same batch twice over gives the same loss."""
    module = balancer(device)
    module(layers(device, tokens=500), 2)
    assert math.isclose(module.fraction.sum().item(), 1.0, rel_tol=1e-6)
    small = layers(device, tokens=5, seed=1)
    due = loss_of(small, fraction_of(layers(device, tokens=500)))
    assert math.isclose(module(small, 2).item(), due, rel_tol=1e-5)
    twice = balancer(device, delay=0)
    once = twice(small, 2).item()
    assert math.isclose(twice([*small, *small], 2).item(), once, rel_tol=1e-5)


def test_an_aborted_micro_batch_leaves_no_trace(device):
    """An exception before the balance loss, and one in a bad call of it."""
    module = balancer(device)
    module(layers(device), 2)
    before = module.fraction.clone()
    wrong = ops.softmax_topk(torch.randn(4, 6, device=device), 2)
    with pytest.raises(ValueError, match="got 6"):
        module([*layers(device, seed=1), wrong], 2)
    assert torch.equal(module.fraction, before)
    aborted = SharedPool().to(device)
    aborted.routers[2].forward = lambda x: (_ for _ in ()).throw(RuntimeError("aborted"))
    state = aborted.balancer.fraction.clone()
    with pytest.raises(RuntimeError, match="aborted"):
        aborted(torch.randn(4, 16, device=device))
    assert torch.equal(aborted.balancer.fraction, state)


@pytest.mark.parametrize("delay", [0, 1])
def test_balance_of_no_tokens_is_zero_and_finite(delay, device):
    module = balancer(device, delay)
    module(layers(device), 2)
    loss = module(layers(device, tokens=0), 2)
    assert loss.item() == 0.0
    loss.backward()
    assert module.fraction.isfinite().all()


def test_perfect_balance_gives_the_coefficient_and_a_finite_gradient(device):
    """Exactly uniform load: the place where a spread-based loss divides by zero."""
    ids = torch.arange(8, dtype=torch.int32, device=device).view(4, 2)
    importance = torch.full((8,), 0.5, device=device, requires_grad=True)
    load = torch.ones(8, dtype=torch.int32, device=device)
    routing = ops.Routing(torch.ones(4, 2, device=device), ids, load, importance)
    loss = balancer(device, delay=0)([routing], 2)
    assert math.isclose(loss.item(), 0.02, rel_tol=1e-6)
    loss.backward()
    assert importance.grad.isfinite().all()


def test_balance_of_the_widest_dtype_and_of_many_layers(device):
    dtype = devices.widest_float()
    logits = torch.randn(30, 8, dtype=dtype, device=device, requires_grad=True)
    routings = [ops.softmax_topk(logits, 2)] * 48
    module = balancer(device, delay=0)
    assert math.isclose(module(routings, 2).item(), loss_of(routings), rel_tol=1e-5)
