# SPDX-License-Identifier: Apache-2.0
"""The pool pass: one weight gradient for all layers, equal to autograd."""

import gc

import devices
import psutil
import pytest
import torch
from pool_stacks import (
    FF,
    MERGED,
    MODES,
    D,
    K,
    L,
    M,
    Stack,
    assert_equal,
    expected,
    gradients,
    inputs,
    loss_of,
)
from torch import Tensor, nn

from unipool.nn import ExpertPool, NormRouter, pooled_moe

pytestmark = pytest.mark.usefixtures("device")


CHECKPOINTING = {"plain": None, "nonreentrant": False, "reentrant": True}


@pytest.mark.parametrize("window", [None, 0, 50_000], ids=["whole", "each", "some"])
@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize("mode", MERGED)
def test_equal_to_autograd(mode, way, window):
    model = Stack(mode, wgrad_window_bytes=window)
    model.use_reentrant = CHECKPOINTING[way]
    loss_of(model(inputs())).backward()
    assert_equal(gradients(model), expected())


def test_window_flushes_and_goes_on():
    pool = ExpertPool(M, D, FF, wgrad_window_bytes=50_000).to(devices.current())
    routers = [NormRouter(D, M, K).to(devices.current()) for _ in range(L)]
    experts, h = pool.begin_pass(), inputs()
    for router in routers:
        h = h + pooled_moe(h, router, experts)[0]
    loss_of(h).backward()
    assert 1 <= experts.collector.flushes < L
    assert not experts.collector.sums  # nothing is held after the backward


@pytest.mark.parametrize("layers", [12, 24, 48])
def test_bfloat16_is_closer_to_the_exact_sum_than_autograd(layers, record_property):
    """The exact sum: every layer's own bfloat16 gradient operands, added up in float64."""
    errors = {}
    for mode in MODES:
        model = Stack(mode, layers=layers).bfloat16()
        exact = [torch.zeros_like(p, dtype=torch.float64) for p in model.pool.parameters()]
        if mode == "deferred":
            collect_exact(model, exact)
        loss = loss_of(model(inputs(dtype=torch.bfloat16)))
        loss.backward()
        errors[mode] = [p.grad.double() for p in model.pool.parameters()]
        if mode == "deferred":
            wanted = exact
    relative = {
        mode: max(
            ((got - want).norm() / want.norm()).item()
            for got, want in zip(grads, wanted, strict=True)
        )
        for mode, grads in errors.items()
    }
    record_property("relative_error", relative)
    assert relative["deferred"] <= 2**-9 * 1.2  # one rounding to bfloat16
    assert relative["accumulate"] <= 2**-9 * 1.2
    assert relative["deferred"] < relative["autograd"] / 1.5


def collect_exact(model: Stack, exact: list[Tensor]) -> None:
    """Adds the float64 products of the segments that layers leave, as they leave them."""
    begin = model.pool.begin_pass

    def begin_pass():
        experts = begin()
        add = experts.collector.add

        def spy(segment, top_k, needs, *origins):
            for e in range(M):
                rows = slice(segment.offsets[e], segment.offsets[e + 1])
                tokens = segment.order[rows].long() // top_k
                exact[0][e] += segment.grad_preact[rows].double().T @ segment.x[tokens].double()
                exact[1][e] += segment.grad[tokens].double().T @ segment.hidden[rows].double()
            add(segment, top_k, needs)

        experts.collector.add = spy
        return experts

    model.pool.begin_pass = begin_pass


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", MERGED)
def test_accumulation_over_micro_batches(mode, set_to_none):
    model = Stack(mode)
    loss_of(model(inputs(9))).backward()
    model.zero_grad(set_to_none=set_to_none)
    for step in range(3):
        loss_of(model(inputs(2 + step))).backward()
    assert_equal(gradients(model), expected(3))


@pytest.mark.parametrize("mode", MERGED)
def test_gradients_of_other_tensors_leave_nothing_behind(mode):
    """autograd.grad for x alone must not add the layers' weight gradients to a later backward."""
    model, x = Stack(mode), inputs()
    loss = loss_of(model(x))
    (grad_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(grad_x, x.grad)
    assert_equal(gradients(model), expected())
    loss.backward()
    assert_equal(gradients(model), {name: 2 * g for name, g in expected().items()})


@pytest.mark.parametrize("mode", MERGED)
def test_autograd_grad_of_the_weights(mode):
    model, wanted = Stack(mode), expected()
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss_of(model(inputs())), list(model.parameters()))
    assert_equal(dict(zip(names, grads, strict=True)), wanted)


@pytest.mark.parametrize("mode", MERGED)
def test_autocast_casts_once_and_equals_autograd(mode):
    grads = {}
    for way in (mode, "autograd"):
        model = Stack(way)
        with torch.autocast(devices.current().type, dtype=torch.bfloat16):
            y = model(inputs())
        loss_of(y).backward()
        grads[way] = gradients(model)
    assert all(g.dtype == torch.float32 for g in grads[mode].values())
    # autograd rounds each of the L terms to bfloat16 before it adds them
    assert_equal(grads[mode], grads["autograd"], bound=2**-8)


@pytest.mark.parametrize("mode", MERGED)
def test_gradient_scaling_and_clipping(mode):
    norms = {}
    for way in (mode, "autograd"):
        model = Stack(way)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(devices.current().type, init_scale=1024.0)
        scaler.scale(loss_of(model(inputs()))).backward()
        scaler.unscale_(optimizer)
        norms[way] = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        norms[way + " after"] = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    assert norms[mode] > 1e-3  # clipping had something to do
    torch.testing.assert_close(norms[mode], norms["autograd"])
    torch.testing.assert_close(norms[mode + " after"], norms["autograd after"])


def test_no_grad_and_inference_begin_no_pass():
    model = Stack("deferred")
    trained = model(inputs())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert model.pool.begin_pass().collector is None
            assert torch.equal(model(inputs()), trained)


@pytest.mark.parametrize("mode", MERGED)
def test_layer_without_tokens_and_layer_used_twice(mode):
    grads = {}
    for way in (mode, "autograd"):
        model = Stack(way)
        experts, x = model.pool.begin_pass(), inputs()
        empty, _ = pooled_moe(x[:0], model.routers[0], experts)
        y = pooled_moe(x, model.routers[1], experts)[0]
        y = y + pooled_moe(y, model.routers[1], experts)[0]
        (loss_of(y) + empty.sum()).backward()
        grads[way] = gradients(model)
    names = ["pool.gate_up_proj", "pool.down_proj", "routers.1.weight"]
    assert_equal({n: grads[mode][n] for n in names}, {n: grads["autograd"][n] for n in names})


@pytest.mark.parametrize("mode", MERGED)
def test_layers_of_different_top_k_share_a_pass(mode):
    grads = {}
    for way in (mode, "autograd"):
        model = Stack(way)
        torch.manual_seed(3)
        routers = [NormRouter(D, M, top_k).to(devices.current()) for top_k in (1, 3, 2)]
        experts, h = model.pool.begin_pass(), inputs()
        for router in routers:
            h = h + pooled_moe(h, router, experts)[0]
        loss_of(h).backward()
        grads[way] = gradients(model)
    assert_equal(grads[mode], grads["autograd"])


@pytest.mark.parametrize("mode", MODES)
def test_experts_without_tokens_get_exact_zeros(mode):
    model = Stack(mode)
    hidden = torch.tensor([True] + [False] * (M - 1), device=devices.current())
    experts, h = model.pool.begin_pass(), inputs()
    for router in model.routers:
        h = h + pooled_moe(h, lambda x, r=router: r(x, mask=hidden), experts)[0]
    loss_of(h).backward()
    for parameter in model.pool.parameters():
        assert torch.equal(parameter.grad[0], torch.zeros_like(parameter.grad[0]))
        assert parameter.grad[1:].abs().sum() > 0


@pytest.mark.parametrize("mode", MERGED)
def test_exception_in_the_middle_then_a_good_step(mode):
    model = Stack(mode)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("broken on purpose")

    experts = model.pool.begin_pass()
    h = pooled_moe(Broken.apply(pooled_moe(inputs(), model.routers[0], experts)[0]),
                   model.routers[1], experts)[0]  # fmt: skip
    with pytest.raises(RuntimeError, match="broken on purpose"):
        loss_of(h).backward()
    model.zero_grad()
    loss_of(model(inputs())).backward()
    assert_equal(gradients(model), expected())


@pytest.mark.parametrize("mode", MERGED)
def test_two_passes_alive_at_once(mode):
    model = Stack(mode)
    losses = [loss_of(model(inputs(2 + step))) for step in range(2)]
    for loss in reversed(losses):
        loss.backward()
    assert_equal(gradients(model), expected(2))


@pytest.mark.parametrize("mode", MERGED)
def test_penalty_on_the_weights_of_a_pass_is_added(mode):
    grads = {}
    for way in (mode, "autograd"):
        model = Stack(way)
        experts, h = model.pool.begin_pass(), inputs()
        for router in model.routers:
            h = h + pooled_moe(h, router, experts)[0]
        (loss_of(h) + 0.1 * experts.gate_up.square().mean()).backward()
        grads[way] = gradients(model)
    assert_equal(grads[mode], grads["autograd"])


def test_hooks_of_the_parameters_fire_once():
    model, fired = Stack("deferred"), []
    for name, parameter in model.pool.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    loss_of(model(inputs())).backward()
    assert sorted(fired) == ["down_proj", "gate_up_proj"]


def test_double_backward_is_refused_in_one_line():
    model, x = Stack("deferred"), inputs()
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only") as caught:
        grad.sum().backward()
    assert "\n" not in str(caught.value).strip()


def test_compile_runs_the_pass_without_a_collector():
    model, wanted = Stack("deferred"), expected()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled(inputs())).backward()
    assert_equal(gradients(model), wanted)


@pytest.mark.any_device
@pytest.mark.parametrize("mode", MERGED)
def test_memory_stays_flat_over_1000_steps(mode):
    model = Stack(mode, layers=2)
    process = psutil.Process()

    def resident_after(steps: int) -> int:
        run_steps(model, steps)
        return process.memory_info().rss

    before = resident_after(200)
    # One step leaves 30 KB of segments: kept, 1,000 of them would be 30 MB.
    assert resident_after(1000) - before < 8 * 2**20


@pytest.mark.parametrize("mode", MERGED)
def test_no_step_keeps_memory_of_a_gpu(mode):
    """Of which torch counts every byte."""
    if devices.current().type == "cpu":
        pytest.skip("torch counts no memory of the CPU; the test above looks at the process")
    model = Stack(mode, layers=2)
    run_steps(model, 2)
    before = torch.cuda.memory_allocated()
    run_steps(model, 5)
    assert torch.cuda.memory_allocated() == before


def run_steps(model: Stack, count: int) -> None:
    for step in range(count):
        loss_of(model(inputs(step))).backward()
        model.zero_grad()
    gc.collect()


@pytest.mark.any_device
def test_bad_arguments():
    with pytest.raises(ValueError, match="weight_grad must be one of deferred, accumulate"):
        ExpertPool(M, D, FF, "eager")
    with pytest.raises(ValueError, match="wgrad_window_bytes must not be negative, got -1"):
        ExpertPool(M, D, FF, wgrad_window_bytes=-1)
