# SPDX-License-Identifier: Apache-2.0
"""Silent slots, docs/math.md (4): a NormRouter score of zero sends a token nowhere."""

import torch
from torch import Tensor

from unipool import ops
from unipool.nn import ExpertPool, NormRouter, PoolBalancer, pooled_moe
from unipool.ops import Routing

M, K, D, F = 12, 4, 32, 64


def layer(device: torch.device, dtype: torch.dtype) -> tuple[NormRouter, ExpertPool]:
    torch.manual_seed(0)
    router = NormRouter(D, M, K, device=device, dtype=dtype)
    pool = ExpertPool(M, D, F, weight_grad="autograd", device=device, dtype=dtype)
    return router, pool


def sent_somewhere(routing: Routing) -> Routing:
    """Silent slots sent to the lowest ids that their tokens do not have, as the tie rule would."""
    ids = routing.experts.tolist()
    for row in ids:
        free = (e for e in range(M) if e not in row)
        row[:] = [next(free) if e < 0 else e for e in row]
    experts = torch.tensor(ids, dtype=torch.int32, device=routing.experts.device)
    return routing._replace(experts=experts)


def test_outputs_and_gradients_are_those_of_sending_them_anywhere(dtype, device):
    router, pool = layer(device, dtype)
    x = torch.randn(100, D, device=device, dtype=dtype, requires_grad=True)
    leaves = [x, *router.parameters(), *pool.parameters()]
    grad = torch.randn(100, D, device=device, dtype=dtype)

    def outcome(change) -> list[Tensor]:
        routing = change(router(x))
        y = ops.expert_mlp(x, routing, pool.gate_up_proj, pool.down_proj)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    silent = (router(x).experts < 0).float().mean()
    assert 0.01 < silent < 0.5
    # To the bit, but for float64: the order of the library's sums follows the number of rows.
    atol = 1e-12 if dtype == torch.float64 else 0
    for here, there in zip(outcome(lambda r: r), outcome(sent_somewhere), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=atol)


def test_the_balance_does_not_depend_on_how_experts_are_numbered(device):
    router, _ = layer(device, torch.float32)
    order = torch.randperm(M, device=device)
    x = torch.randn(100, D, device=device)
    losses, grads = [], []
    for ids in (torch.arange(M, device=device), order):
        renamed = NormRouter(D, M, K, device=device)
        renamed.weight.data.copy_(router.weight.data[ids])
        loss = PoolBalancer(M, 0.01, delay=0)([renamed(x)], K)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.empty_like(renamed.weight).index_copy_(0, ids, renamed.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)


def test_a_layer_in_which_nobody_speaks(device):
    """No row is dispatched; y is zero, and so are all gradients but none is missing."""
    router, pool = layer(device, torch.float32)
    router.weight.data.copy_(-torch.rand_like(router.weight))
    x = torch.rand(20, D, device=device, requires_grad=True)
    y, routing = pooled_moe(x, router, pool)
    assert routing.experts.eq(-1).all()
    assert routing.load.eq(0).all()
    assert y.eq(0).all()
    loss = y.sum() + PoolBalancer(M, 0.01, delay=0)([routing], K)
    loss.backward()
    for leaf in (x, *router.parameters(), *pool.parameters()):
        assert leaf.grad.eq(0).all()
