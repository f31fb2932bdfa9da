# SPDX-License-Identifier: Apache-2.0
"""The router modules: logits, parameters, gradients."""

import copy
import math

import pytest
import torch
from tolerance import Tolerance, check_close, check_equal
from torch import Tensor, nn

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
