# SPDX-License-Identifier: Apache-2.0
"""ExpertPool and pooled_moe."""

import pytest
import torch
from modules import SharedPool
from torch import Tensor, nn

from unipool import ops
from unipool.nn import (
    ExpertPool,
    NormRouter,
    pooled_moe,
)


def test_pool_parameters():
    pool = ExpertPool(5, 8, 6)
    assert {n: tuple(p.shape) for n, p in pool.named_parameters()} == {
        "gate_up_proj": (5, 12, 8),
        "down_proj": (5, 8, 6),
    }
    torch.manual_seed(0)
    pool = ExpertPool(64, 64, 64)
    pool.reset_parameters(std=0.01)
    for p in pool.parameters():
        assert abs(p.std().item() - 0.01) < 1e-3
        assert abs(p.mean().item()) < 1e-3


@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 16), (2, 1, 3, 16), (0, 16), (2, 0, 16), (16,)])
def test_pooled_moe_takes_any_leading_shape(shape, device):
    torch.manual_seed(1)
    router, pool = NormRouter(16, 6, 2).to(device), ExpertPool(6, 16, 8).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y, routing = pooled_moe(x, router, pool)
    assert y.shape == x.shape
    assert routing.experts.shape == (x.numel() // 16, 2)
    y.sum().backward()
    assert x.grad.shape == x.shape
    flat = ops.expert_mlp(x.reshape(-1, 16), routing, pool.gate_up_proj, pool.down_proj)
    assert torch.equal(y.reshape(-1, 16), flat)


def test_pooled_moe_of_a_transposed_sequence(device):
    torch.manual_seed(1)
    router, pool = NormRouter(16, 6, 2).to(device), ExpertPool(6, 16, 8).to(device)
    x = torch.randn(5, 3, 16, device=device)
    y, _ = pooled_moe(x, router, pool)
    swapped, _ = pooled_moe(x.transpose(0, 1), router, pool)
    torch.testing.assert_close(swapped.transpose(0, 1), y)


def test_any_callable_may_route(device):
    """A caller's own routing: one expert for everybody, weight 1."""
    pool = ExpertPool(3, 8, 4).to(device)

    def route(x: Tensor) -> ops.Routing:
        T = x.shape[0]
        ids = torch.full((T, 1), 2, dtype=torch.int32, device=device)
        load = torch.tensor([0, 0, T], dtype=torch.int32, device=device)
        return ops.Routing(torch.ones(T, 1, device=device), ids, load, load.float())

    x = torch.randn(6, 8, device=device)
    y, _ = pooled_moe(x, route, pool)
    gate, up = (x @ pool.gate_up_proj[2].T).chunk(2, -1)
    torch.testing.assert_close(y, (nn.functional.silu(gate) * up) @ pool.down_proj[2].T)


def test_three_steps_train_every_parameter_and_agree_with_the_reference(device, poisoned_memory):
    """Three steps, since a dirty buffer may only show in the second backward."""
    torch.manual_seed(0)
    model = SharedPool().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(2, 40, 16, device=device)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        y, balance = model(x)
        loss = (y - target).square().mean() + balance
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.ne(0).any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_recomputation_changes_nothing(kind, device):
    """Gradients, loss and state are those without checkpointing: layers are pure."""
    results = []
    for checkpointing in (None, kind):
        torch.manual_seed(0)
        model = SharedPool(checkpoint=checkpointing).to(device)
        x = torch.randn(40, 16, device=device, requires_grad=True)
        for _ in range(2):
            y, balance = model(x)
            (y.square().mean() + balance).backward()
        grads = [p.grad for p in model.parameters()]
        results.append([y, balance, x.grad, model.balancer.fraction, *grads])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_the_pool_is_stored_once():
    model = SharedPool(layers=5)
    names = [n for n in model.state_dict() if n.endswith(("gate_up_proj", "down_proj"))]
    assert names == ["pool.gate_up_proj", "pool.down_proj"]
