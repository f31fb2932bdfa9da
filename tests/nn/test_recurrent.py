# SPDX-License-Identifier: Apache-2.0
"""RecurrentRouter against a transcription of its equations."""

import copy

import pytest
import torch
from tolerance import Tolerance, check_close, check_equal
from torch import Tensor, nn

from unipool import reference
from unipool.nn import ExpertPool, RecurrentRouter, pooled_moe
from unipool.nn.recurrent import gru_step
from unipool.nn.router import norm_router_calibration

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
LAYERS, D, M, K, P = 4, 16, 24, 3, 10
SCORINGS = {
    "softmax": {"scoring": "softmax"},
    "renormalized": {"scoring": "softmax", "renormalize": True},
    "norm": {"scoring": "norm"},
}
GRU = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.fixture(params=SCORINGS)
def scoring(request) -> dict:
    return SCORINGS[request.param]


class Stack(nn.Module):
    """The routers of several layers, and the GRU of all of them."""

    def __init__(self, scoring: dict, layers: int = LAYERS) -> None:
        super().__init__()
        self.cell = nn.GRUCell(P, P)
        self.routers = nn.ModuleList(RecurrentRouter(D, M, K, P, **scoring) for _ in range(layers))
        with torch.no_grad():
            for parameter in self.cell.parameters():  # gates that are far from one half
                parameter.normal_()
            for layer, router in enumerate(self.routers):
                if router.scale is not None:
                    router.scale.fill_(1 + layer / 4)

    def forward(self, xs: Tensor, mask: Tensor | None = None) -> list[tuple]:
        """xs [L, T, D] -> (logits, state, Routing) of each layer."""
        results, state = [], None
        for x, router in zip(xs, self.routers, strict=True):
            logits, _ = router.logits(x, self.cell, state)
            routing, state = router(x, self.cell, state, mask)
            results.append((logits, state, routing))
        return results


def transcribed(stack: Stack, xs: Tensor, mask: Tensor | None = None) -> list[tuple]:
    """The same by unipool.reference alone."""
    results, state = [], None
    gru = {name: getattr(stack.cell, name) for name in GRU}
    for x, router in zip(xs, stack.routers, strict=True):
        logits, state = reference.recurrent_logits(x, router.proj.weight, router.weight, gru, state)
        if router.scoring == "norm":
            c = norm_router_calibration(M, K)
            routing = reference.norm_topk(logits, router.scale, K, calibration=c, mask=mask)
        else:
            renormalize = router.renormalize
            routing = reference.softmax_topk(logits, K, renormalize=renormalize, mask=mask)
        results.append((logits, state, routing))
    return results


def loss_of(results: list[tuple], generator: torch.Generator) -> Tensor:
    """A sum over all layers that every output enters with a weight of its own."""
    loss = 0.0
    for _, state, routing in results:
        for t in (routing.weights, routing.importance, state):
            weight = torch.randn(t.shape, generator=generator, dtype=F64).to(t)
            loss = loss + (weight * t).sum()
    return loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int = 30, layers: int = LAYERS, dtype=torch.float32) -> Tensor:
    return torch.randn(layers, count, D, generator=seeded(), dtype=dtype)


def cpu_double(stack: Stack) -> Stack:
    return copy.deepcopy(stack).cpu().double()


# --- the router


def test_transcription_is_the_gru_of_torch():
    """The reference is of the same recurrence that a GRUCell computes, in its layout of weights."""
    cell = nn.GRUCell(P, P, dtype=F64)
    x, h = torch.randn(2, 7, P, dtype=F64)
    eye = torch.eye(P, dtype=F64)
    gru = {name: getattr(cell, name) for name in GRU}
    logits, state = reference.recurrent_logits(x, eye, eye, gru, h)
    torch.testing.assert_close(state, cell(x, h), rtol=1e-12, atol=1e-14)
    assert torch.equal(logits, state)


@pytest.mark.parametrize("bias", [True, False])
def test_step_is_the_gru_of_torch(bias):
    cell = nn.GRUCell(P, P, bias=bias, dtype=F64)
    u, h = torch.randn(2, 7, P, dtype=F64)
    torch.testing.assert_close(gru_step(cell, u, h), cell(u, h), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_layers_equal_the_transcription_in_float64(scoring, masked):
    stack = Stack(scoring).double()
    twin = copy.deepcopy(stack)
    mask = torch.arange(M) % 5 == 0 if masked else None
    xs, twin_xs = (tokens(dtype=F64).requires_grad_() for _ in range(2))
    got, due = stack(xs, mask), transcribed(twin, twin_xs, mask)
    for (logits, state, routing), (due_logits, due_state, due_routing) in zip(
        got, due, strict=True
    ):
        assert logits.dtype == state.dtype == routing.weights.dtype == F64
        torch.testing.assert_close(logits, due_logits, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(state, due_state, rtol=1e-11, atol=1e-13)
        check_equal(routing.experts, due_routing.experts)
        check_equal(routing.load, due_routing.load)
        torch.testing.assert_close(routing.weights, due_routing.weights, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            routing.importance, due_routing.importance, rtol=1e-10, atol=1e-12
        )
        assert state.abs().amax(0).min() > 0.1  # far from where the GRU is linear
    loss_of(got, seeded(1)).backward()
    loss_of(due, seeded(1)).backward()
    names = [name for name, _ in stack.named_parameters()]
    assert [n for n in names if n.startswith("cell")] == [f"cell.{name}" for name in GRU]
    pairs = zip(stack.parameters(), twin.parameters(), strict=True)
    for name, (a, b) in zip([*names, "x"], [*pairs, (xs, twin_xs)], strict=True):
        assert b.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["softmax", "norm"])
def test_gradcheck_through_two_layers(kind):
    stack = Stack(SCORINGS[kind], layers=2).double()
    xs = tokens(3, 2, F64).requires_grad_()
    names = [name for name, _ in stack.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in stack.parameters()]

    def outputs(xs, *values):
        found = torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (xs,))
        return [t for _, h, r in found for t in (h, r.weights, r.importance)]

    assert torch.autograd.gradcheck(outputs, (xs, *values), fast_mode=True)


def test_gradient_runs_down_through_the_state(scoring, device):
    """What only the last layer routes reaches the projection of the first."""
    stack = Stack(scoring).to(device)
    stack(tokens().to(device))[-1][2].weights.square().sum().backward()
    assert stack.routers[0].proj.weight.grad.abs().max() > 1e-6
    assert stack.routers[0].weight.grad is None  # its logits are of its own layer


def check_layers(got: list[tuple], due: list[tuple]) -> None:
    """float32 results against float64; every layer adds to the rounding of the state."""
    for layer, ((logits, state, routing), (due_logits, due_state, due_routing)) in enumerate(
        zip(got, due, strict=True)
    ):
        tolerance = Tolerance(300 * (layer + 1), 0)
        check_close(logits, due_logits, tolerance, torch.float32, "logits")
        check_close(state, due_state, tolerance, torch.float32, "state")
        check_equal(routing.experts.cpu(), due_routing.experts)
        check_close(routing.weights, due_routing.weights, tolerance, torch.float32, "weights")
        check_close(
            routing.importance, due_routing.importance, tolerance, torch.float32, "importance"
        )


def test_float32_layers_agree_with_float64(scoring, device):
    stack = Stack(scoring).to(device)
    due = transcribed(cpu_double(stack), tokens().double())
    check_layers(stack(tokens().to(device)), due)


def test_everything_is_float32_under_autocast_and_in_bfloat16(scoring, device):
    stack = Stack(scoring).to(device)
    xs = tokens().to(device)
    plain = stack(xs)
    with torch.autocast(device.type, torch.bfloat16):
        lowered = stack(xs)
    for a, b in zip(plain, lowered, strict=True):
        for s, t in zip((*a[:2], *a[2]), (*b[:2], *b[2]), strict=True):
            assert torch.equal(s, t)
    narrow = copy.deepcopy(stack).bfloat16()
    due = transcribed(cpu_double(narrow), xs.bfloat16().cpu().double())
    got = narrow(xs.bfloat16())
    check_layers(got, due)
    loss_of(got, seeded(1)).backward()
    for name, parameter in narrow.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad.isfinite().all(), name


def test_no_tokens(scoring, device):
    stack = Stack(scoring).to(device)
    results = stack(tokens(0).to(device))
    for _, state, routing in results:
        assert state.shape == (0, P)
        assert routing.experts.shape == (0, K)
        assert routing.load.tolist() == [0] * M
    loss_of(results, seeded()).backward()
    assert all(p.grad.eq(0).all() for p in stack.cell.parameters())


def test_tokens_do_not_see_each_other(scoring, device):
    """No recurrence over time: a token's routing is the same in any company."""
    stack = Stack(scoring).to(device)
    xs = tokens(8).to(device)
    together, alone = stack(xs), stack(xs[:, 5:6])
    for (_, state, routing), (_, one_state, one) in zip(together, alone, strict=True):
        torch.testing.assert_close(state[5:6], one_state)
        torch.testing.assert_close(routing.weights[5:6], one.weights)
        assert torch.equal(routing.experts[5:6], one.experts)


def test_the_state_steers_the_routing(scoring, device):
    stack = Stack(scoring).to(device)
    xs = tokens(200).to(device)
    kept = stack(xs)[1][2].experts
    cut, _ = stack.routers[1](xs[1], stack.cell)
    assert (kept != cut.experts).float().mean() > 0.1


def test_layer_on_a_pool_trains_every_parameter(device):
    """The router as pooled_moe's callable, in a model without Hugging Face."""
    stack, pool = Stack(SCORINGS["norm"]).to(device), ExpertPool(M, D, 8).to(device)
    x, state = tokens(layers=1)[0].to(device), None
    experts = pool.begin_pass()
    for router in stack.routers:
        routing, state = router(x, stack.cell, state)
        y, returned = pooled_moe(x, lambda _, routing=routing: routing, experts)
        assert returned is routing
        x = x + y
    x.square().mean().backward()
    for name, p in [*stack.named_parameters(), *pool.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.ne(0).any(), name


def test_parameters(scoring):
    router = RecurrentRouter(D, M, K, P, **scoring)
    shapes = {"proj.weight": (P, D), "weight": (M, P)}
    if scoring["scoring"] == "norm":
        shapes["scale"] = (1,)
        assert router.scale.item() == 1.0
        assert router.calibration == norm_router_calibration(M, K)
    else:
        assert router.scale is None
    assert {n: tuple(p.shape) for n, p in router.named_parameters()} == shapes
    low = RecurrentRouter(D, M, K, P, **scoring, dtype=torch.bfloat16)
    assert low.proj.weight.dtype == low.weight.dtype == torch.bfloat16
    assert low.scale is None or low.scale.dtype == torch.float32
    wide = RecurrentRouter(400, 300, K, 100, **scoring)
    assert abs(wide.proj.weight.std().item() * 20 - 1) < 0.03
    assert abs(wide.weight.std().item() * 10 - 1) < 0.03
    wide.reset_parameters(std=0.02)
    assert abs(wide.proj.weight.std().item() / 0.02 - 1) < 0.03
    assert abs(wide.weight.std().item() / 0.02 - 1) < 0.03


def test_built_on_the_meta_device_and_filled_later(scoring, device):
    with torch.device("meta"):
        router = RecurrentRouter(D, M, K, P, **scoring)
    assert all(p.is_meta for p in router.parameters())
    router = router.to_empty(device=device)
    router.reset_parameters()
    routing, _ = router(torch.randn(5, D, device=device), nn.GRUCell(P, P, device=device))
    assert routing.weights.isfinite().all()


def test_compiles_without_graph_breaks(scoring, device):
    stack = Stack(scoring).to(device)
    twin = copy.deepcopy(stack)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    xs = tokens().to(device)
    got, due = compiled(xs), twin(xs)
    loss_of(got, seeded(1)).backward()
    loss_of(due, seeded(1)).backward()
    for (_, state, routing), (_, due_state, due_routing) in zip(got, due, strict=True):
        torch.testing.assert_close(state, due_state)
        torch.testing.assert_close(tuple(routing), tuple(due_routing))
    for a, b in zip(stack.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


ROUTER = RecurrentRouter(8, 4, 2, 5)
CELL = nn.GRUCell(5, 5)
X = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecurrentRouter(0, 4, 1, 5), "d_model must be at least 1, got 0"),
        (lambda: RecurrentRouter(8, 4, 5, 5), r"top_k must be in \[1, min\(M=4, 16\)\], got 5"),
        (lambda: RecurrentRouter(8, 4, 2, 0), "d_state must be at least 1, got 0"),
        (
            lambda: RecurrentRouter(8, 4, 2, 5, "relu"),
            "scoring must be one of softmax, norm, got 'relu'",
        ),
        (
            lambda: RecurrentRouter(8, 4, 1, 5, renormalize=True),
            "renormalize must be False unless .*, got True with scoring='softmax', top_k=1",
        ),
        (
            lambda: RecurrentRouter(8, 4, 2, 5, "norm", renormalize=True),
            "renormalize must be False unless .*, got True with scoring='norm'",
        ),
        (lambda: ROUTER(torch.zeros(3, 9), CELL), r"x must be \[T, 8\], got \[3, 9\]"),
        (lambda: ROUTER(torch.zeros(8), CELL), r"x must be \[T, 8\], got \[8\]"),
        (lambda: ROUTER(X, None), "cell must be a torch.nn.GRUCell, got NoneType"),
        (lambda: ROUTER(X, nn.LSTMCell(5, 5)), "cell must be a torch.nn.GRUCell, got LSTMCell"),
        (
            lambda: ROUTER(X, nn.GRUCell(5, 6)),
            r"cell must be GRUCell\(5, 5\), got GRUCell\(5, 6\)",
        ),
        (
            lambda: ROUTER(X, CELL, torch.zeros(2, 5)),
            r"state must be \[T=3, 5\], got \[2, 5\]",
        ),
        (
            lambda: ROUTER(X, CELL, torch.zeros(5)),
            r"state must be \[T=3, 5\], got \[5\]",
        ),
    ],
)
def test_bad_arguments_give_one_line(build, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        build()
    assert str(caught.value).startswith("RecurrentRouter: ")
    assert "\n" not in str(caught.value)
