# SPDX-License-Identifier: Apache-2.0
"""What holds for every op alike: registration, autograd guard, compile, autocast, bad input."""

import re
from dataclasses import replace

import bad_calls
import pytest
import torch
import torch._dynamo.testing
from cases import BY_NAME, Case, acc_dtype, logits, plan, pool, rand, weights
from specs import (
    EXPERT_MLP,
    GROUPED_MM,
    PUBLIC_OPS,
    SPECS,
    UNPERMUTE_WEIGHTED,
    oracle,
    run,
    to_device,
)
from tolerance import check_results
from torch import Tensor

from unipool import ops, reference

RAW_OPS = {
    "router_logits",
    "router_logits_bwd",
    "norm_topk",
    "norm_topk_bwd",
    "softmax_topk",
    "softmax_topk_bwd",
    "dispatch_plan",
    "permute",
    "unpermute",
    "unpermute_bwd",
    "grouped_mm",
    "grouped_mm_bwd_a",
    "grouped_wgrad",
    "grouped_wgrad_",
    "expert_mlp",
    "expert_mlp_bwd",
    "expert_mlp_bwd_",
}
WRITTEN = {"grouped_wgrad_": "sum", "expert_mlp_bwd_": "preact"}  # arguments that an op changes
PYTHON_OPS = {"snapshot"}  # unipool.nn.balance; one for all backends
SMALL = Case("contract", 9, 6, 2, 8, 4, routing="dropped")


def raw_calls(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[tuple[str, dict]]:
    """(op, arguments) for every raw op; an optional argument is once present and once absent."""
    M, k = case.experts, case.top_k
    p = plan(case, device)

    def on_device(t: Tensor) -> Tensor:
        return t.to(device)

    z = on_device(logits(case, dtype))
    scale = on_device(torch.tensor(1.25, dtype=acc_dtype(dtype)))
    routed = reference.softmax_topk(z, k)
    bias = on_device(rand(case, "bias", M).to(acc_dtype(dtype)))
    mask = torch.arange(M, device=device) % 3 == 1
    x, grad = (on_device(rand(case, t, case.tokens, case.d_model).to(dtype)) for t in ("x", "g"))
    y, rows = (
        on_device(rand(case, t, case.tokens * k, case.d_model).to(dtype)) for t in ("y", "rows")
    )
    hidden = on_device(rand(case, "hidden", case.tokens * k, case.d_ff).to(dtype))
    preact = on_device(rand(case, "preact", case.tokens * k, 2 * case.d_ff).to(dtype))
    w = on_device(weights(case, dtype))
    router = on_device(rand(case, "router", M, case.d_model).to(dtype))
    grad_z = on_device(rand(case, "grad_z", case.tokens, M).to(acc_dtype(dtype)))
    gate_up, down = map(on_device, pool(case, dtype))

    grad_w, grad_p = torch.ones_like(routed.weights), torch.ones_like(routed.importance)
    both = {"grad_weights": grad_w, "grad_importance": grad_p, "logits": z}
    only_w, only_p = both | {"grad_importance": None}, both | {"grad_weights": None}
    steer, plain = {"bias": bias, "mask": mask}, {"bias": None, "mask": None}
    norm = {"calibration": 3.0, "eps": 1e-8}
    norm_bwd = {"scale": scale, "experts": routed.experts, **norm}
    softmax_bwd = {"experts": routed.experts, "renormalize": False}
    one = {"grad": [rows], "input": [x], "order": [p.order], "offsets": [p.offsets]}
    gathered = {"grad_top_k": 0, "input_top_k": k}
    two = {"grad": [hidden] * 2, "input": [rows, y], "order": [], "offsets": [p.offsets] * 2}
    in_rows = {"grad_top_k": 0, "input_top_k": 0}
    total = torch.ones(M, case.d_model, case.d_model, dtype=acc_dtype(dtype), device=device)
    mlp = {"weights": w, "gate_up": gate_up, "down": down, **p._asdict()}
    return [
        ("router_logits", {"x": x, "weight": router}),
        ("router_logits_bwd", {"grad": grad_z, "x": x, "weight": router}),
        ("norm_topk", {"logits": z, "scale": scale, "top_k": k, **norm, **plain}),
        ("norm_topk", {"logits": z, "scale": scale, "top_k": k, **norm, **steer}),
        ("norm_topk_bwd", {**both, **norm_bwd, "mask": mask}),
        ("norm_topk_bwd", {**only_p, **norm_bwd, "mask": None}),
        ("softmax_topk", {"logits": z, "top_k": k, "renormalize": False, **plain}),
        ("softmax_topk", {"logits": z, "top_k": k, "renormalize": k > 1, **steer}),
        ("softmax_topk_bwd", {**both, **softmax_bwd, "mask": mask}),
        ("softmax_topk_bwd", {**only_w, **softmax_bwd, "renormalize": k > 1, "mask": None}),
        ("dispatch_plan", {"experts": [routed.experts], "num_experts": M}),
        ("dispatch_plan", {"experts": [routed.experts, routed.experts], "num_experts": M}),
        ("permute", {"x": x, "order": p.order, "top_k": k}),
        ("unpermute", {"y": y, "inverse": p.inverse, "weights": None}),
        ("unpermute", {"y": y, "inverse": p.inverse, "weights": w}),
        (
            "unpermute_bwd",
            {"grad": grad, "y": y, "order": p.order, "inverse": p.inverse, "weights": w},
        ),
        ("grouped_mm", {"a": y, "b": gate_up, "offsets": p.offsets}),
        ("grouped_mm_bwd_a", {"grad": y, "b": down, "offsets": p.offsets}),
        ("grouped_wgrad", {**one, **gathered}),
        ("grouped_wgrad", {**two, **in_rows, "out_dtype": acc_dtype(dtype)}),
        ("grouped_wgrad_", {"sum": total, **one, **gathered}),
        ("expert_mlp", {"x": x, **mlp, "keep_preact": True}),
        ("expert_mlp", {"x": x, **mlp, "keep_preact": False}),
        ("expert_mlp_bwd", {"grad": grad, **mlp, "preact": preact}),
        ("expert_mlp_bwd_", {"grad": grad, **mlp, "preact": preact.clone()}),
    ]


RAW_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(raw_calls(SMALL, torch.float32))]


def tensors(result: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result) if result is not None else []


# --- registration


def test_every_op_of_the_library_is_listed_here():
    """An op that is added without a sample call below is tested by nothing in this file."""
    prefix = "unipool::"
    names = torch._C._dispatch_get_all_op_names()
    found = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
    assert found - PYTHON_OPS == RAW_OPS
    assert {name for name, _ in raw_calls(SMALL, torch.float32)} == RAW_OPS


def test_every_public_op_has_a_specification_and_an_oracle():
    assert {re.sub("_(steered|renormalized|weighted)$", "", s.name) for s in SPECS} == PUBLIC_OPS
    for name in PUBLIC_OPS:
        assert callable(getattr(ops, name))
        assert callable(getattr(reference, name))


@pytest.mark.parametrize("index", range(len(RAW_IDS)), ids=RAW_IDS)
@pytest.mark.parametrize("case", [SMALL, Case("none", 0, 6, 2, 8, 4)], ids=str)
def test_opcheck(index, case, backend, device):
    name, arguments = raw_calls(case, torch.float32, device)[index]
    torch.library.opcheck(getattr(backend.raw, name).default, tuple(arguments.values()))


@pytest.mark.parametrize("index", range(len(RAW_IDS)), ids=RAW_IDS)
def test_fake_agrees_with_the_kernel_in_every_dtype(index, dtype, backend, device):
    name, arguments = raw_calls(SMALL, dtype, device)[index]
    op = getattr(backend.raw, name).default
    real = tensors(op(*arguments.values()))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        as_fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        fake = tensors(op(*as_fake.values()))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [
        (r.shape, r.dtype, r.stride()) for r in real
    ]


@pytest.mark.parametrize("index", range(len(RAW_IDS)), ids=RAW_IDS)
def test_raw_op_refuses_to_lose_a_gradient(index, backend, device):
    name, arguments = raw_calls(SMALL, torch.float32, device)[index]
    floats = [t for t in tensors(arguments) if isinstance(t, Tensor) and t.is_floating_point()]
    if not floats:
        return  # dispatch_plan
    floats[0].requires_grad_()

    def backward() -> None:
        outputs = tensors(getattr(backend.raw, name)(*arguments.values()))
        (sum(t.sum() for t in outputs if t.is_floating_point()) + floats[0].sum()).backward()

    with pytest.raises(RuntimeError):
        backward()


@pytest.mark.parametrize("index", range(len(RAW_IDS)), ids=RAW_IDS)
def test_every_element_of_an_output_is_written(index, dtype, backend, device, poisoned_memory):
    """With fresh memory full of NaN, results are the same as with whatever was there before."""
    name, arguments = raw_calls(SMALL, dtype, device)[index]
    again = torch.utils._pytree.tree_map_only(Tensor, torch.clone, arguments)
    op = getattr(backend.raw, name)
    poisoned = tensors(op(*arguments.values()))
    torch.utils.deterministic.fill_uninitialized_memory = False
    for got, due in zip(poisoned, tensors(op(*again.values())), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, due)


def test_poisoned_memory_does_poison(poisoned_memory):
    assert torch.empty(8).isnan().all()


@pytest.mark.parametrize("index", range(len(RAW_IDS)), ids=RAW_IDS)
def test_inputs_are_left_alone(index, dtype, backend, device):
    name, arguments = raw_calls(SMALL, dtype, device)[index]
    before = torch.utils._pytree.tree_map_only(Tensor, torch.clone, arguments)
    outputs = tensors(getattr(backend.raw, name)(*arguments.values()))
    for each in (before, arguments):
        each.pop(WRITTEN.get(name), None)
    for was, now in zip(tensors(before), tensors(arguments), strict=True):
        if isinstance(was, Tensor):
            assert torch.equal(was, now)
            assert all(o.data_ptr() != now.data_ptr() or o.numel() == 0 for o in outputs)


# --- compile and autocast


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compile_full_graph_with_a_dynamic_number_of_tokens(spec, device):
    """Bit-equal to eager, forward and backward, for any T; none but T = 0 compiles again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    sizes = {"top_k": 2, "num_experts": 6}

    def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return spec.call(ops, inputs | sizes)

    step = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for T in (9, 5, 33, 0):
        case = Case(f"compile{T}", T, 6, 2, 8, 4, routing="dropped")
        inputs = to_device(spec.inputs(case, torch.float32), device)
        inputs = {n: t for n, t in inputs.items() if n not in sizes}
        eager, traced = (
            run(replace(spec, call=lambda _, i, f=f: f(i)), case, ops, inputs) for f in (call, step)
        )
        frames.append(counter.frame_count)
        for name, due in eager.items():
            assert torch.equal(traced[name], due) if due is not None else traced[name] is None, name
    assert frames[0] >= 1
    assert frames[2] == frames[0], "compiled again for a new T"


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", [EXPERT_MLP, GROUPED_MM], ids=str)
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(spec, x_dtype, device):
    """The products behave like torch.matmul: bfloat16 inside, whatever mix of float32 parameters
    and bfloat16 activations comes in."""
    case = BY_NAME["M_not_pow2"]
    inputs = spec.inputs(case, torch.float32)
    first = spec.differentiable[0]
    inputs[first] = inputs[first].to(x_dtype)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(spec, case, ops, to_device(inputs, device))
    rounded = {
        n: t.bfloat16() if t.is_floating_point() and n != "weights" else t
        for n, t in inputs.items()
    }
    for name in spec.differentiable:
        assert got[f"grad_{name}"].dtype == inputs[name].dtype, name
    assert got[next(iter(spec.tolerances(case)))].dtype == torch.bfloat16
    as_bf16 = {
        n: t.bfloat16() if t.is_floating_point() and n != "grad_weights" else t
        for n, t in got.items()
    }
    due = oracle(spec, case, rounded)
    check_results(spec, case, rounded, as_bf16, due, torch.bfloat16)


@pytest.mark.parametrize("spec", [EXPERT_MLP, GROUPED_MM], ids=str)
def test_autocast_keeps_float64(spec, backend, device):
    """As torch.matmul does: autocast is for what is meant to be fast."""
    if torch.float64 not in backend.dtypes:
        pytest.skip("the backend has no float64")
    inputs = to_device(spec.inputs(BY_NAME["dropped"], torch.float64), device)
    with torch.autocast(device.type, torch.bfloat16):
        results = spec.call(ops, inputs)
    assert all(t.dtype == torch.float64 for t in results.values())


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in (EXPERT_MLP, GROUPED_MM)], ids=str)
def test_autocast_leaves_the_other_ops_alone(spec, device):
    case = BY_NAME["M_not_pow2"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    due = run(spec, case, ops, inputs)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(spec, case, ops, inputs)
    for name, value in due.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


def test_autocast_unpermute_takes_rows_of_a_bfloat16_product(device):
    case = BY_NAME["ragged"]
    inputs = to_device(UNPERMUTE_WEIGHTED.inputs(case, torch.bfloat16), device)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(UNPERMUTE_WEIGHTED, case, ops, inputs)
    assert got["out"].dtype == torch.bfloat16
    assert got["grad_weights"].dtype == torch.float32


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(spec, mode, device):
    case = BY_NAME["dropped"]
    inputs = to_device(spec.inputs(case, torch.float32), device)
    for name in spec.differentiable:
        inputs[name].requires_grad_()
    due = spec.call(ops, inputs)
    with mode():
        got = spec.call(ops, inputs)
    for name, value in got.items():
        assert not value.requires_grad
        assert torch.equal(value, due[name])


def test_ops_on_the_meta_device():
    """Shapes of a model can be worked out without memory, forward and backward."""
    for spec in SPECS:
        inputs = to_device(spec.inputs(BY_NAME["dropped"], torch.float32), torch.device("meta"))
        sizes = {n: 2 for n in ("top_k", "num_experts") if n in inputs}
        leaves = {n: inputs[n].requires_grad_() for n in spec.differentiable}
        results = spec.call(ops, inputs | leaves | sizes)
        assert all(t.is_meta for t in results.values()), spec
        floats = [t.sum() for t in results.values() if t.requires_grad]
        if floats:
            sum(floats).backward()
        assert all(t.grad.shape == t.shape for t in leaves.values()), spec


# --- bad input

BAD_CALLS = bad_calls.all_rows()


def test_there_are_enough_bad_calls():
    assert len(BAD_CALLS) >= 120
    assert {row[0] for row in BAD_CALLS} == RAW_OPS


@pytest.mark.parametrize("op", sorted(RAW_OPS))
def test_the_call_that_is_spoilt_is_valid(op, backend, device):
    bad_calls.call(op, on(device, bad_calls.valid_arguments()[op]), backend.raw)


def on(device: torch.device, arguments: dict) -> dict:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments)


@pytest.mark.parametrize(
    ("op", "name", "spoil", "named"),
    BAD_CALLS,
    ids=[f"{op}-{name}-{i}" for i, (op, name, _, _) in enumerate(BAD_CALLS)],
)
def test_bad_call_gives_one_line_that_names_op_and_argument(
    op, name, spoil, named, backend, device
):
    if backend.name != "cpu" and getattr(spoil, "is_value", False):
        pytest.skip("index values are on the device; out of range they are dropped or ignored")
    if spoil is Tensor.half and torch.float16 in backend.dtypes:
        pytest.skip("float16 is a dtype of this backend")
    arguments = on(device, bad_calls.valid_arguments()[op])
    arguments[name] = spoil(arguments[name])
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        bad_calls.call(op, arguments, backend.raw)
    message = str(caught.value)
    if "\nDeclaration: " in message:  # torch's own: a value that does not fit the schema
        message = message.split("\nPosition: ")[0]
    assert "\n" not in message.strip(), message
    called = op.rstrip("_")  # grouped_wgrad_ shares the checks of grouped_wgrad
    assert re.match(rf"(unipool::)?{called}_?\b", message), message
    assert re.search(rf"\b({named})\b", message.removeprefix(op)), message
