# SPDX-License-Identifier: Apache-2.0
"""Properties of all ops: random shapes, gradcheck, layouts, determinism, partial gradients."""

from collections.abc import Callable
from itertools import chain, combinations

import pytest
import torch
from cases import BY_NAME, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specs import (
    EXPERT_MLP,
    NORM_TOPK,
    PERMUTE,
    ROUTER_LOGITS,
    SOFTMAX_TOPK,
    SOFTMAX_TOPK_RENORMALIZED,
    SPECS,
    oracle,
    run,
    to_device,
    upstream,
)
from tolerance import check_results
from torch import Tensor

from unipool import ops

DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


# --- random shapes


@st.composite
def any_case(draw: Callable, max_tokens: int = 40, max_width: int = 40) -> Case:
    M = draw(st.one_of(st.integers(1, 12), st.sampled_from([32, 33, 64, 96, 160, 257])))
    return Case(
        "any",
        tokens=draw(st.one_of(st.integers(0, 4), st.integers(0, max_tokens))),
        experts=M,
        top_k=draw(st.integers(1, min(M, 16))),
        d_model=draw(st.integers(1, max_width)),
        d_ff=draw(st.integers(1, max_width)),
        routing=draw(st.sampled_from(["uniform", "zipf", "one", "dropped", "none"])),
        logits=draw(st.sampled_from(["normal", "ties", "dead"])),
        seed=draw(st.integers(0, 2**16)),
    )


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@FUZZ
@given(case=any_case())
def test_any_shape_agrees_with_the_oracle(spec, dtype, device, case):
    """On two threads for every fourth case, so that a race has a chance to show."""
    if spec is SOFTMAX_TOPK_RENORMALIZED and case.top_k == 1:
        return
    inputs = spec.inputs(case, dtype)
    torch.set_num_threads(2 if case.seed % 4 == 3 else 1)
    actual = run(spec, case, ops, to_device(inputs, device))
    torch.set_num_threads(1)
    check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)


@FUZZ
@given(case=any_case(), layers=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_plan_of_any_layers_sorts_the_slots(device, case, layers):
    ids = [
        torch.randint(
            -1, case.experts + 1, (T, case.top_k), generator=case.generator("layer", i)
        ).int()
        for i, T in enumerate(layers)
    ]
    order, inverse, offsets = (
        t.cpu() for t in ops.dispatch_plan([t.to(device) for t in ids], case.experts)
    )
    flat = torch.cat(ids).flatten().tolist()
    due = sorted((e, slot) for slot, e in enumerate(flat) if 0 <= e < case.experts)
    assert order[: len(due)].tolist() == [slot for _, slot in due]
    assert offsets.tolist() == [sum(e < m for e, _ in due) for m in range(case.experts + 1)]
    rows = {slot: row for row, (_, slot) in enumerate(due)}
    assert inverse.flatten().tolist() == [rows.get(slot, -1) for slot in range(len(flat))]


# --- gradients by finite differences, with no reference at all


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("gradcheck", 5, 7, 3, 4, 3),
        Case("gradcheck_dropped", 6, 4, 2, 3, 5, routing="dropped"),
        Case("gradcheck_one", 4, 3, 2, 3, 2, routing="one"),
    ],
    ids=str,
)
def test_gradcheck(spec, case, backend, device):
    if torch.float64 not in backend.dtypes:
        pytest.skip("the backend has no float64")
    inputs = to_device(spec.inputs(case, torch.float64), device)

    def call(*leaves: Tensor) -> list[Tensor]:
        results = spec.call(ops, inputs | dict(zip(spec.differentiable, leaves, strict=True)))
        return [t for t in results.values() if t.is_floating_point()]

    leaves = [inputs[n].clone().requires_grad_() for n in spec.differentiable]
    assert torch.autograd.gradcheck(call, leaves)


# --- which gradients are asked for


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, n) for n in range(len(names) + 1)))


@pytest.mark.parametrize(
    ("spec", "wrt"),
    [(spec, wrt) for spec in DIFFERENTIABLE for wrt in subsets(spec.differentiable)],
    ids=lambda v: "+".join(v) or "nothing" if isinstance(v, tuple) else str(v),
)
def test_frozen_inputs(spec, wrt, device):
    """Any subset of inputs may need a gradient; the results and the gradients stay the same."""
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    everything = run(spec, case, ops, inputs)
    got = run(spec, case, ops, inputs, wrt=wrt)
    for name, due in everything.items():
        if name.startswith("grad_") and name.removeprefix("grad_") not in wrt:
            assert got[name] is None, name
        else:
            assert torch.equal(got[name], due), name


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
def test_gradients_accumulate_over_two_backwards(spec, device):
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    once = run(spec, case, ops, inputs)
    leaves = {n: t.detach().requires_grad_() if n in spec.differentiable else t
              for n, t in inputs.items()}  # fmt: skip
    results = spec.call(ops, leaves)
    roots = {n: t for n, t in results.items() if t.requires_grad}
    grads = [upstream(case, n, t) for n, t in roots.items()]
    torch.autograd.backward(list(roots.values()), grads, retain_graph=True)
    torch.autograd.backward(list(roots.values()), grads)
    for name in spec.differentiable:
        torch.testing.assert_close(leaves[name].grad, 2 * once[f"grad_{name}"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
def test_second_backward_and_double_backward_are_refused_in_one_line(spec, device):
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    leaf = inputs[spec.differentiable[0]].requires_grad_()
    out = next(t for t in spec.call(ops, inputs).values() if t.requires_grad)
    loss = out.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError) as freed:
        loss.backward()
    out = next(t for t in spec.call(ops, inputs).values() if t.requires_grad)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError) as twice:
        grad.sum().backward()
    for error in (freed, twice):
        assert "\n" not in str(error.value).strip()


# --- memory layouts


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else t


def strided(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, along the last axis."""
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


def padded_rows(t: Tensor) -> Tensor:
    """Rows that do not touch: row stride D + 3."""
    return torch.nn.functional.pad(t, (0, 3))[..., : t.shape[-1]] if t.dim() else t


def misaligned(t: Tensor) -> Tensor:
    """Storage that starts one element after an aligned address, as in a memory-mapped file."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    view = storage[1:].view(t.shape)
    view.copy_(t)
    return view


def negated_view(t: Tensor) -> Tensor:
    """A lazily negated view has the right strides and the wrong bits."""
    return torch._neg_view(-t) if t.is_floating_point() else t


LAYOUTS = [transposed, strided, padded_rows, misaligned, negated_view]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layout_of_inputs_and_upstream_gradients(spec, layout, dtype, device):
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, dtype), device)
    changed = {n: layout(t) if n not in ("top_k", "num_experts") else t for n, t in inputs.items()}
    leaves = {
        n: t.detach().requires_grad_() if n in spec.differentiable else t
        for n, t in changed.items()
    }
    results = spec.call(ops, leaves)
    roots = [n for n, t in results.items() if t.requires_grad]
    if roots:
        grads = [layout(upstream(case, n, results[n])) for n in roots]
        torch.autograd.backward([results[n] for n in roots], grads)
    actual = results | {f"grad_{n}": leaves[n].grad for n in spec.differentiable}
    check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=str)
def test_expanded_upstream_gradient(spec, dtype, device):
    """sum() sends back a gradient whose strides are all 0."""
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, dtype), device)
    grads = []
    for expand in (False, True):
        leaves = [inputs[n].detach().requires_grad_() for n in spec.differentiable]
        out = spec.call(ops, inputs | dict(zip(spec.differentiable, leaves, strict=True)))
        roots = [t for t in out.values() if t.requires_grad]
        if expand:
            sum(t.sum() for t in roots).backward()
        else:
            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
        grads.append([leaf.grad for leaf in leaves])
    for plain, expanded in zip(*grads, strict=True):
        assert torch.equal(plain, expanded)


@pytest.mark.parametrize(
    "spec", [PERMUTE, EXPERT_MLP, NORM_TOPK, SOFTMAX_TOPK, ROUTER_LOGITS], ids=str
)
def test_expanded_tokens(spec, dtype, device):
    """All tokens are one row with stride 0; the gradient of the row is the sum over tokens."""
    case = BY_NAME["dropped"]
    inputs = spec.inputs(case, dtype)
    first = spec.differentiable[0]
    inputs[first] = inputs[first][:1].expand(case.tokens, -1)
    actual = run(spec, case, ops, to_device(inputs, device))
    check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)


# --- determinism


def assert_same(got: dict, due: dict, what: str) -> None:
    for name, value in due.items():
        assert torch.equal(got[name], value), f"{name} differs {what}"


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("case", ["ragged", "bench_small", "M_not_pow2"])
def test_bitwise_equal_for_any_number_of_threads(spec, case, dtype, backend, device):
    if backend.name != "cpu":
        pytest.skip("host threads do nothing here")
    if case in spec.skip:
        case = "k_is_M"
    case = BY_NAME[case]
    inputs = to_device(spec.inputs(case, dtype), device)
    torch.set_num_threads(1)  # restored by the backend's fixture
    one = run(spec, case, ops, inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(run(spec, case, ops, inputs), one, f"with {threads} threads")


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bitwise_repeatable(spec, device):
    """Repeats with other allocations in between, so that buffers move."""
    case = BY_NAME["ragged"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    first = run(spec, case, ops, inputs)
    held = []
    for repeat in range(10):
        held.append(torch.full((1000 * repeat + 7,), torch.nan, device=device))
        assert_same(run(spec, case, ops, inputs), first, f"in repeat {repeat}")


def test_a_token_does_not_depend_on_its_neighbours(device):
    """Row t of the output is the same, within rounding, alone and in the batch."""
    case = BY_NAME["ragged"]
    inputs = to_device(EXPERT_MLP.inputs(case, torch.float32), device)
    y = EXPERT_MLP.call(ops, inputs)["y"]
    for t in (0, 63, 126):
        rows = {n: inputs[n][t : t + 1] for n in ("x", "weights", "experts")}
        torch.testing.assert_close(EXPERT_MLP.call(ops, inputs | rows)["y"], y[t : t + 1])
