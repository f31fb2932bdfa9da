# SPDX-License-Identifier: Apache-2.0
"""Modules: routers, the expert pool, a layer on it, and the balance loss of a pool."""

import copy
import io
import math
import subprocess
import sys

import devices
import numpy as np
import pytest
import torch
from published import CALIBRATION
from tolerance import Tolerance, check_close, check_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unipool import ops, reference
from unipool.nn import (
    ExpertPool,
    NormRouter,
    PoolBalancer,
    RecurrentRouter,
    SoftmaxRouter,
    pooled_moe,
)
from unipool.nn.router import norm_router_calibration, wide_logits

SIZES = [*range(1, 17), 24, 32, 33, 64, 96, 127, 160, 192, 288, 384, 513, 1024]


# --- calibration


@pytest.mark.parametrize(("M", "k", "value"), CALIBRATION)
def test_calibration_has_the_published_values(M, k, value):
    assert abs(norm_router_calibration(M, k) - value) < 0.02


@pytest.mark.parametrize(("M", "k"), [(64, 1), (64, 8), (96, 2), (160, 16), (384, 4), (1024, 1)])
def test_calibration_agrees_with_an_independent_estimate(M, k):
    due = reference.norm_router_calibration(M, k, draws=1 << 14)
    assert math.isclose(norm_router_calibration(M, k), due, rel_tol=0.006)


@pytest.mark.parametrize("M", SIZES)
def test_calibration_is_finite_and_falls_with_k(M):
    """1 <= c: the norm of a part of a unit vector is at most 1; more experts, a longer part."""
    ks = sorted({k for k in (1, 2, 3, 4, 8, 15, 16) if k <= M})
    values = [norm_router_calibration(M, k) for k in ks]
    assert all(math.isfinite(c) and 1 <= c <= 40 for c in values)
    assert values == sorted(values, reverse=True)


def test_calibration_grows_with_the_pool():
    values = [norm_router_calibration(M, 1) for M in (16, 32, 64, 128, 256, 512, 1024)]
    assert values == sorted(values)


def test_calibration_is_the_same_in_another_process():
    """Whatever was drawn from torch's and numpy's global generators before."""
    program = (
        "import numpy, torch; numpy.random.seed(7); torch.manual_seed(7); torch.set_num_threads(1);"
        "from unipool.nn.router import norm_router_calibration as c;"
        "print([c(96, 2).hex(), c(8, 1).hex()])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    here = [norm_router_calibration(96, 2).hex(), norm_router_calibration(8, 1).hex()]
    assert out.stdout.strip() == str(here)


def test_calibration_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    norm_router_calibration(47, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_weights_start_with_unit_norm(device):
    """What the calibration is for: the mean of 1 / |weights / c| is c, so |weights| is about 1."""
    router = NormRouter(64, 96, 2).to(device)
    x = torch.randn(4000, 64, device=device)
    norm = router(x).weights.norm(dim=1)
    assert abs(norm.mean() - 1) < 0.05


# --- routers

ROUTERS = [
    pytest.param(lambda **o: NormRouter(16, 24, 3, **o), id="norm"),
    pytest.param(lambda **o: SoftmaxRouter(16, 24, 3, **o), id="softmax"),
    pytest.param(lambda **o: SoftmaxRouter(16, 24, 3, renormalize=True, **o), id="renormalized"),
]


def expected_routing(router: nn.Module, x: Tensor, mask: Tensor | None = None) -> ops.Routing:
    """From the definition, in float64 on the CPU."""
    z = x.detach().cpu().double() @ router.weight.detach().cpu().double().T
    if isinstance(router, NormRouter):
        scale = router.scale.detach().cpu().double()
        c = router.calibration
        return reference.norm_topk(z, scale, router.top_k, calibration=c, mask=mask)
    return reference.softmax_topk(z, router.top_k, renormalize=router.renormalize, mask=mask)


def check_routing(got: ops.Routing, due: ops.Routing, reduction: int) -> None:
    check_equal(got.experts, due.experts)
    check_equal(got.load, due.load)
    for name in ("weights", "importance"):
        value = getattr(got, name)
        assert value.dtype == torch.float32
        # Logits are rounded before the norm or softmax, which at most doubles the error.
        check_close(value, getattr(due, name), Tolerance(4 * reduction, 0), torch.float32, name)


@pytest.mark.parametrize("make", ROUTERS)
def test_router_agrees_with_its_definition(make, device):
    router = make().to(device)
    x = torch.randn(50, 16, device=device)
    mask = torch.arange(24) % 5 == 0
    check_routing(router(x), expected_routing(router, x), 200)
    check_routing(router(x, mask=mask.to(device)), expected_routing(router, x, mask), 200)


@pytest.mark.parametrize("make", ROUTERS)
def test_router_computes_logits_in_float32(make, device):
    """For bfloat16 modules and under autocast: a routing decision must not be a rounding error."""
    router = make().to(device)
    x = torch.randn(64, 16, device=device)
    plain = router(x)
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = router(x)
    for a, b in zip(plain, under_autocast, strict=True):
        assert torch.equal(a, b)
    low = copy.deepcopy(router).bfloat16()
    x_low = x.bfloat16()
    check_routing(low(x_low), expected_routing(low, x_low), 200)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_mixed_dtypes(x_dtype, w_dtype, device):
    """float32 logits and gradients in the dtype of each input, whatever mix of dtypes comes in."""
    x = torch.randn(9, 16, device=device).to(x_dtype).requires_grad_()
    weight = torch.randn(5, 16, device=device).to(w_dtype).requires_grad_()
    got = wide_logits(x, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x.float() @ weight.float().T)
    got.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (x_dtype, w_dtype)
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(9, -1).to(x_dtype))
    torch.testing.assert_close(weight.grad, x.float().sum(0).expand(5, -1).to(w_dtype))


@pytest.mark.parametrize("make", ROUTERS)
def test_router_gradients_reach_every_parameter_and_x(make, device):
    router = make().to(device)
    x = torch.randn(50, 16, device=device, requires_grad=True)
    routing = router(x)
    (routing.weights.square().sum() + routing.importance.square().sum()).backward()
    for name, parameter in [("x", x), *router.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name


@pytest.mark.parametrize("make", ROUTERS)
def test_router_is_deterministic_and_takes_no_tokens(make, device):
    router = make().to(device)
    x = torch.randn(300, 16, device=device)
    first = router(x)
    for _ in range(3):
        for a, b in zip(first, router(x), strict=True):
            assert torch.equal(a, b)
    empty = router(x[:0])
    assert empty.weights.shape == (0, 3)
    assert empty.load.tolist() == [0] * 24
    (empty.weights.sum() + empty.importance.sum()).backward()
    assert router.weight.grad.eq(0).all()


def test_router_parameters():
    router = NormRouter(16, 24, 3)
    assert {n: tuple(p.shape) for n, p in router.named_parameters()} == {
        "weight": (24, 16),
        "scale": (1,),
    }
    assert router.scale.dtype == torch.float32
    assert router.scale.item() == 1.0
    assert isinstance(router.calibration, float)
    assert router.calibration == norm_router_calibration(24, 3)
    assert [n for n, _ in SoftmaxRouter(16, 24, 3).named_parameters()] == ["weight"]
    assert NormRouter(16, 24, 3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert NormRouter(16, 24, 3, dtype=torch.bfloat16).scale.dtype == torch.float32


def saved_without_dimension(router: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        router.scale.fill_(1.25)
    return {n: t.reshape(()) if n == "scale" else t for n, t in router.state_dict().items()}


@pytest.mark.parametrize(
    "make", [lambda: NormRouter(16, 24, 3), lambda: RecurrentRouter(16, 24, 3, 8, "norm")]
)
def test_a_scale_saved_without_dimensions_loads(make):
    router = make()
    router.load_state_dict(saved_without_dimension(make()))
    assert router.scale.tolist() == [1.25]
    outer = torch.nn.Sequential(make())
    outer.load_state_dict({f"0.{n}": t for n, t in saved_without_dimension(make()).items()})
    assert outer[0].scale.tolist() == [1.25]
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        router.load_state_dict({**router.state_dict(), "scale": torch.ones(2)})


def test_routers_can_be_built_on_the_meta_device_and_filled_later(device):
    with torch.device("meta"):
        router, pool = NormRouter(16, 24, 3), ExpertPool(24, 16, 8)
    assert router.weight.is_meta
    router, pool = router.to_empty(device=device), pool.to_empty(device=device)
    router.reset_parameters()
    pool.reset_parameters(std=0.01)
    y, _ = pooled_moe(torch.randn(5, 16, device=device), router, pool)
    assert y.isfinite().all()
    assert router.scale.item() == 1.0


@pytest.mark.parametrize(
    "build",
    [
        lambda: NormRouter(8, 4, 5),
        lambda: NormRouter(8, 4, 0),
        lambda: NormRouter(8, 40, 17),
        lambda: NormRouter(8, 0, 1),
        lambda: NormRouter(0, 4, 1),
        lambda: SoftmaxRouter(8, 4, 5),
        lambda: SoftmaxRouter(8, 4, 1, renormalize=True),
        lambda: ExpertPool(0, 8, 8),
        lambda: ExpertPool(4, 0, 8),
        lambda: ExpertPool(4, 8, 0),
        lambda: ExpertPool(4, 8, -1),
        lambda: PoolBalancer(0, 0.1),
        lambda: PoolBalancer(4, 0.1, delay=2),
        lambda: PoolBalancer(4, 0.1, delay=-1),
        lambda: PoolBalancer(4, math.nan),
        lambda: PoolBalancer(4, 0.1)([], 1),
        lambda: NormRouter(8, 4, 2)(torch.randn(3, 9)),
        lambda: NormRouter(8, 4, 2)(torch.randn(8)),
        lambda: NormRouter(8, 4, 2)(torch.randn(3, 8), mask=torch.zeros(5, dtype=torch.bool)),
        lambda: pooled_moe(torch.randn(3, 8), NormRouter(8, 4, 2), ExpertPool(5, 8, 8)),
        lambda: pooled_moe(torch.randn(3, 8), NormRouter(8, 4, 2), ExpertPool(3, 8, 8)),
        lambda: pooled_moe(torch.randn(3, 8), NormRouter(8, 4, 2), ExpertPool(4, 9, 8)),
        lambda: PoolBalancer(5, 0.1)([NormRouter(8, 4, 2)(torch.randn(3, 8))], 2),
        lambda: PoolBalancer(4, 0.1)([NormRouter(8, 4, 2)(torch.randn(3, 8))], 1),
    ],
)
def test_bad_module_arguments_give_one_line(build):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        build()
    assert "\n" not in str(caught.value)
    assert ", got " in str(caught.value)


# --- pool and layer


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


class SharedPool(nn.Module):
    """L layers, each with its own router, on one pool owned by the root."""

    def __init__(self, layers: int = 3, checkpoint: str | None = None) -> None:
        super().__init__()
        self.pool = ExpertPool(8, 16, 12)
        self.routers = nn.ModuleList(NormRouter(16, 8, 2) for _ in range(layers))
        self.balancer = PoolBalancer(8, 0.01)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routings = []
        for router in self.routers:
            if self.checkpoint is None:
                y, *routing = self.layer(x, router)
            else:
                reentrant = self.checkpoint == "reentrant"
                y, *routing = checkpoint(self.layer, x, router, use_reentrant=reentrant)
            x = x + y
            routings.append(ops.Routing(*routing))
        return x, self.balancer(routings, 2)

    def layer(self, x: Tensor, router: nn.Module) -> tuple[Tensor, ...]:
        """Flat: reentrant checkpointing sees no gradient inside a nested tuple."""
        y, routing = pooled_moe(x, router, self.pool)
        return y, *routing


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


# --- balance loss


def layers(device, tokens: int = 20, count: int = 3, seed: int = 0) -> list[ops.Routing]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ops.softmax_topk(torch.randn(tokens, 8, generator=generator).to(device).requires_grad_(), 2)
        for _ in range(count)
    ]


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
