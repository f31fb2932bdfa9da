# SPDX-License-Identifier: Apache-2.0
"""A pool is entered through `__call__`, so what works by hooks of modules meets its weights."""

import copy

import pytest
import torch
from small_models import make_ids, make_model

from unipool.nn import ExpertPool
from unipool.nn.pool_pass import PoolPass

pytestmark = pytest.mark.any_device


def test_a_pass_runs_the_hooks():
    pool, calls = ExpertPool(3, 4, 5), []
    pool.register_forward_pre_hook(lambda *_: calls.append("before"))
    pool.register_forward_hook(lambda *_: calls.append("after"))
    assert isinstance(pool.begin_pass(), PoolPass)
    assert isinstance(pool(), PoolPass)
    assert calls == ["before", "after"] * 2


def test_half_of_a_layers_use_is_refused():
    with pytest.raises(TypeError, match="both x and routing, or neither"):
        ExpertPool(3, 4, 5)(torch.zeros(2, 4))


@pytest.fixture
def one_rank(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("weight_grad", ["deferred", "accumulate", "autograd"])
@pytest.mark.parametrize("reshard", [True, False])
def test_a_pool_sharded_on_its_own_has_all_its_gradients(reshard, weight_grad, one_rank):
    """Freed after its forward or kept: steps equal those of the model alone, to rounding."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(2)
    alone = make_model(weight_grad=weight_grad, initializer_range=0.2).cpu().train()
    model = copy.deepcopy(alone)
    for layer in model.model.layers:
        fully_shard(layer)
    for pool in model.model.pools:
        fully_shard(pool, reshard_after_forward=reshard)
    fully_shard(model)
    ids = make_ids(2, 16).cpu()
    for step in range(2):
        losses = [m(ids + step, labels=ids).loss for m in (alone, model)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
        for loss in losses:
            loss.backward()
        sharded = dict(model.named_parameters())
        for name, parameter in alone.named_parameters():
            grad = sharded[name].grad.full_tensor()
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
        with torch.no_grad():
            for m in (alone, model):
                for parameter in m.parameters():
                    parameter -= 0.1 * parameter.grad
                m.zero_grad()


def test_evaluation_of_a_freed_pool(one_rank):
    from torch.distributed.fsdp import fully_shard

    alone = make_model().cpu().eval()
    model = copy.deepcopy(alone)
    for pool in model.model.pools:
        fully_shard(pool)
    fully_shard(model)
    ids = make_ids(1, 8).cpu()
    with torch.no_grad():
        assert model(ids).logits.equal(alone(ids).logits)


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload"])
def test_offloaded_weights_are_found(place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model().cpu().eval()
    ids = make_ids(1, 8).cpu()
    due = model(ids).logits
    if place == "disk_offload":
        model = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        model = accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.pools[0].gate_up_proj.is_meta
    assert model(ids).logits.equal(due)
