# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps for its backward, and what the backward does with it."""

from collections.abc import Callable

import pytest
import torch
from cases import Case
from specs import EXPERT_MLP, to_device
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from unipool import ops
from unipool.nn import ExpertPool, SoftmaxRouter, pooled_moe

# The pre-activations are greater than any other tensor of the case, those of the pool among them.
LARGE = Case("memory", 256, 4, 2, 16, 64)
LEAVES = ("x", "weights", "gate_up", "down")


def layer_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    inputs = to_device(EXPERT_MLP.inputs(case, dtype), device)
    for name in LEAVES:
        inputs[name].requires_grad_()
    return inputs


def layer(i: dict[str, Tensor]) -> Tensor:
    routing = ops.Routing(i["weights"], i["experts"], None, None)
    return ops.expert_mlp(i["x"], routing, i["gate_up"], i["down"])


def preact_bytes(case: Case, dtype: torch.dtype) -> int:
    return case.tokens * case.top_k * 2 * case.d_ff * dtype.itemsize


def gradients(i: dict[str, Tensor]) -> dict[str, Tensor]:
    taken = {name: i[name].grad for name in LEAVES}
    for name in LEAVES:
        i[name].grad = None
    return taken


def assert_same(got: dict[str, Tensor], due: dict[str, Tensor]) -> None:
    for name in LEAVES:
        assert torch.equal(got[name], due[name]), name


def allocations(run: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes of each allocation that torch's allocators see."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    kind = (
        torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    )
    events = profile.profiler.kineto_results.events()
    return [
        e.nbytes()
        for e in events
        if e.name() == "[memory]" and e.nbytes() > 0 and e.device_type() == kind
    ]


# --- what is kept


@pytest.mark.parametrize("top_k", [1, 2])
def test_saved_bytes_of_a_layer_in_bfloat16(top_k, device):
    """2D + 4kF bytes per token: x and the pre-activations. Beside them the router weights, order
    and inverse (4 bytes per slot each) and the offsets; parameters are not counted."""
    case = Case("saved", 300, 8, top_k, 64, 48)
    inputs = layer_inputs(case, torch.bfloat16, device)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        layer(inputs)
    for name in ("gate_up", "down"):
        assert saved.pop(inputs[name].untyped_storage().data_ptr()) == inputs[name].nbytes
    a_token = 2 * case.d_model + 4 * top_k * case.d_ff
    plan = 12 * top_k * case.tokens + 4 * (case.experts + 1)
    assert sum(saved.values()) <= a_token * case.tokens + plan


def test_forward_without_gradients_keeps_no_preactivations(device):
    inputs = layer_inputs(LARGE, torch.bfloat16, device)

    def forward() -> None:
        with torch.no_grad():
            layer(inputs)

    assert max(allocations(forward, device)) < preact_bytes(LARGE, torch.bfloat16)


# --- backward writes over the pre-activations


def test_backward_reuses_the_preactivations(dtype, device):
    """No second [N, 2F] buffer is allocated; with retain_graph there is one."""
    inputs = layer_inputs(LARGE, dtype, device)
    y = layer(inputs)
    limit = preact_bytes(LARGE, dtype)
    kept = allocations(lambda: y.sum().backward(retain_graph=True), device)
    assert sum(size >= limit for size in kept) == 1
    assert max(allocations(lambda: y.sum().backward(), device)) < limit


def test_backward_twice_through_a_retained_graph(dtype, device):
    inputs = layer_inputs(LARGE, dtype, device)
    y = layer(inputs)
    grad = torch.randn_like(y)
    y.backward(grad, retain_graph=True)
    due = gradients(inputs)
    y.backward(grad, retain_graph=True)
    assert_same(gradients(inputs), due)
    y.backward(grad)  # the last one may write over the pre-activations
    assert_same(gradients(inputs), due)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(grad)


def test_autograd_grad_of_some_inputs(device):
    inputs = layer_inputs(LARGE, torch.float32, device)
    y = layer(inputs)
    y.sum().backward(retain_graph=True)
    due = gradients(inputs)
    (down,) = torch.autograd.grad(y.sum(), inputs["down"], retain_graph=True)
    x, gate_up = torch.autograd.grad(y.sum(), (inputs["x"], inputs["gate_up"]))
    for name, got in (("down", down), ("x", x), ("gate_up", gate_up)):
        assert torch.equal(got, due[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_of_a_checkpointed_layer(reentrant, device):
    inputs = layer_inputs(LARGE, torch.bfloat16, device)
    layer(inputs).sum().backward()
    due = gradients(inputs)
    leaves = [inputs[name] for name in LEAVES]

    def block(*tensors: Tensor) -> Tensor:
        return layer(inputs | dict(zip(LEAVES, tensors, strict=True)))

    checkpoint(block, *leaves, use_reentrant=reentrant).sum().backward()
    assert_same(gradients(inputs), due)


def test_tensors_held_by_saved_tensor_hooks_are_left_alone(device):
    """What a hook was given it may show to others: the backward must not write to it."""
    inputs = layer_inputs(LARGE, torch.float32, device)
    layer(inputs).sum().backward()
    due = gradients(inputs)
    held: list[Tensor] = []

    def pack(t: Tensor) -> int:
        held.append(t)
        return len(held) - 1

    with saved_tensors_hooks(pack, held.__getitem__):
        y = layer(inputs)
    before = [t.clone() for t in held]
    y.sum().backward()
    assert_same(gradients(inputs), due)
    assert all(torch.equal(t, was) for t, was in zip(held, before, strict=True))


@pytest.mark.parametrize("mode", ["deferred", "accumulate", "autograd"])
def test_pool_pass_over_reused_preactivations(mode, device):
    """Segments of a deferred gradient hold the reused memory; a retained graph holds both."""
    torch.manual_seed(0)
    options = {"device": device}
    pool = ExpertPool(6, 16, 32, **options)
    pool.weight_grad = mode
    routers = [SoftmaxRouter(16, 6, 2, **options) for _ in range(2)]
    x = torch.randn(64, 16, **options)

    def step(retain: bool) -> tuple[Tensor, Tensor]:
        pool.zero_grad()
        experts, y = pool.begin_pass(), x
        for router in routers:
            y = y + pooled_moe(y, router, experts)[0]
        y.square().sum().backward(retain_graph=retain)
        return pool.gate_up_proj.grad.clone(), pool.down_proj.grad.clone()

    for got, due in zip(step(False), step(True), strict=True):
        assert torch.equal(got, due)
