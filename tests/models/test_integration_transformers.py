# SPDX-License-Identifier: Apache-2.0
"""Hugging Face MoE models under experts_implementation="unipool" against their own eager experts.

Models are random and so scaled that a wrong expert layer changes logits and gradients by about
their own size. Bounds are relative errors in the L2 norm, of each token's logits and each gradient.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import cases
import devices
import pytest
import specs
import torch
from tolerance import check_results
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

import unipool.integrations.transformers as integration  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "use_cache": True,
    "pad_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 8}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8}),
    "olmoe": ("Olmoe", {"intermediate_size": 20, "num_experts": 10, "norm_topk_prob": False}),
}
FLOAT32 = 1e-5
# Roundings to bfloat16 between a layer's routing, which both ways share, and a gradient: eager's
# expert layer has about 10 forward (a gate's counts as four) and 8 backward, ours 7 and 5, and each
# way some 15 more in norms, residuals, attention and logits. All are independent: 60 in quadrature.
BFLOAT16 = 60**0.5 * torch.finfo(torch.bfloat16).eps


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def make_model(name, implementation="unipool", layers=2, dtype=torch.float32) -> nn.Module:
    prefix, options = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(
        **SHAPE, **options, num_hidden_layers=layers, experts_implementation=implementation
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).to(devices.current(), dtype)


def make_ids(*shape) -> torch.Tensor:
    ids = torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    return ids.to(devices.current())


def step(model, implementation, autocast=None, balance=True) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of the loss, with or without balance loss, of each parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = make_ids(2, 24)
    with torch.autocast(devices.current().type, autocast) if autocast else nullcontext():
        output = model(ids, labels=ids, output_router_logits=balance, use_cache=False)
    output.loss.backward()
    assert not balance or output.aux_loss > 0
    return {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


def assert_close(actual, expected, bound):
    assert actual.keys() == expected.keys()
    for key, want in expected.items():
        got = actual[key]
        assert got is not None, f"{key}: missing"
        assert got.dtype == want.dtype, key
        width = want.shape[-1] if key == "logits" else want.numel()  # a token's logits on their own
        got, want = (t.double().reshape(-1, width) for t in (got, want))
        error = ((got - want).norm(dim=1) / want.norm(dim=1)).max()
        assert error <= bound, f"{key}: relative error {error:.2g}, allowed {bound:.2g}"


class FusedForwards(TorchDispatchMode):
    """Keeps the arguments of each fused forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.unipool.expert_mlp.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls() -> Iterator[list[tuple]]:
    with FusedForwards() as forwards:
        yield forwards.calls


# --- models


def test_logits_and_gradients_equal_eager(name):
    model = make_model(name)
    assert_close(step(model, "unipool"), step(model, "eager"), FLOAT32)


def test_bfloat16_logits_and_gradients_equal_eager(name):
    # One layer: a second layer's routers would see inputs that differ, and may choose otherwise.
    model = make_model(name, layers=1, dtype=torch.bfloat16)
    assert_close(step(model, "unipool"), step(model, "eager"), BFLOAT16)


def test_autocast(name):
    model = make_model(name, layers=1)
    got, want = (step(model, i, torch.bfloat16) for i in ("unipool", "eager"))
    assert got["lm_head.weight"].dtype == torch.float32
    assert_close(got, want, BFLOAT16)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant, calls):
    model = make_model(name).train()
    balance = not reentrant  # that kind takes the router logits, which are no output, without grad
    plain = step(model, "unipool", balance=balance)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls.clear()
    checkpointed = step(model, "unipool", balance=balance)
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert_close(checkpointed, plain, 0.0)


def test_generate_equals_eager(name, calls):
    model, prompt = make_model(name).eval(), make_ids(3, 5)
    written = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert len(calls) == 12 * model.config.num_hidden_layers
    assert written.unique().numel() > 5
    model.set_experts_implementation("eager")
    assert torch.equal(written, model.generate(prompt, max_new_tokens=12, do_sample=False))


def test_from_pretrained_and_the_models_own_weights(name, calls, tmp_path):
    model = make_model(name, "eager").eval()
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, experts_implementation="unipool").eval()
    loaded = loaded.to(devices.current())
    ids = make_ids(2, 9)
    with torch.no_grad():
        got, want = loaded(ids).logits, model(ids).logits
    assert_close({"logits": got}, {"logits": want}, FLOAT32)
    modules = [m for m in loaded.modules() if hasattr(m, "gate_up_proj")]
    assert [(c[2].data_ptr(), c[3].data_ptr()) for c in calls] == [
        (m.gate_up_proj.data_ptr(), m.down_proj.data_ptr()) for m in modules
    ]


# --- one module of experts


def make_experts(case, inputs=None) -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=case.d_model,
        intermediate_size=case.d_ff,
        num_local_experts=case.experts,
        experts_implementation="unipool",
    )
    module = MixtralExperts(config)
    if inputs is not None:
        module.gate_up_proj = nn.Parameter(inputs["gate_up"].clone())
        module.down_proj = nn.Parameter(inputs["down"].clone())
    return module.to(devices.current())


def expert_inputs(case, dtype) -> dict[str, torch.Tensor]:
    return specs.to_device(specs.EXPERT_MLP.inputs(case, dtype), devices.current())


@pytest.mark.parametrize("case_name", ["empty", "ragged", "ties", "dropped"])
def test_experts_against_the_oracle(case_name, dtype):
    case, spec = cases.BY_NAME[case_name], specs.EXPERT_MLP
    inputs = expert_inputs(case, dtype)
    module = make_experts(case, inputs)
    x, weights = (inputs[n].clone().requires_grad_() for n in ("x", "weights"))
    y = module(x, inputs["experts"].long(), weights)
    y.backward(specs.upstream(case, "y", y))
    gate_up, down = module.gate_up_proj, module.down_proj
    leaves = {"x": x, "weights": weights, "gate_up": gate_up, "down": down}
    actual = {"y": y.detach()} | {f"grad_{n}": t.grad for n, t in leaves.items()}
    check_results(spec, case, inputs, actual, specs.oracle(spec, case, inputs), dtype)


def test_tokens_of_another_dtype_are_cast_to_that_of_the_weights():
    case = cases.BY_NAME["ties"]
    inputs = expert_inputs(case, torch.bfloat16)
    module = make_experts(case, inputs)
    routing = inputs["experts"], inputs["weights"]
    with torch.no_grad():
        wide, narrow = module(inputs["x"].float(), *routing), module(inputs["x"], *routing)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, narrow.float())


def test_compile_without_graph_breaks():
    case = cases.BY_NAME["ties"]
    inputs = expert_inputs(case, torch.float32)
    module = make_experts(case, inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (module, compiled):
        module.zero_grad()
        y = forward(inputs["x"], inputs["experts"].long(), inputs["weights"])
        y.square().sum().backward()
        results.append({"y": y.detach(), "gate_up": module.gate_up_proj.grad.clone()})
    assert_close(results[1], results[0], FLOAT32)


# --- bad input


@pytest.mark.any_device
@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"has_gate": False}, "got no gate; choose"),
        ({"has_bias": True}, "got biases; choose"),
        ({"is_transposed": True}, "got transposed weights; choose"),
        ({"is_concatenated": False}, "got interleaved gate and up rows; choose"),
        ({"has_post_expert_norm": True}, "got a norm after each expert; choose"),
        ({"act_fn": nn.GELU()}, "got the activation GELU instead of SiLU; choose"),
        ({"act_fn": torch.tanh}, "got the activation tanh instead of SiLU; choose"),
        ({"has_bias": True, "is_transposed": True}, "got biases, transposed weights; choose"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_layout_is_refused(attributes, says):
    case = cases.BY_NAME["one_token"]
    module = make_experts(case)
    for key, value in attributes.items():
        if hasattr(module, key):
            delattr(module, key)
        setattr(module, key, value)
    with pytest.raises(ValueError, match=r'^experts_implementation="unipool": Mixtral') as error:
        module(torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.any_device
def test_quantized_weights_are_refused():
    module = make_experts(cases.BY_NAME["one_token"])
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.int8), requires_grad=False)
    assert integration.unsupported(module) == ["weights of torch.int8"]


@pytest.mark.any_device
def test_a_whole_model_of_another_layout_is_refused():
    config = transformers.GptOssConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_local_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        experts_implementation="unipool",
    )
    says = f"{GptOssExperts.__name__} must be SwiGLU experts .* biases, .* a gating of its own"
    with pytest.raises(ValueError, match=says):
        transformers.GptOssForCausalLM(config)(make_ids(1, 4))


@pytest.mark.any_device
def test_the_package_imports_no_library_and_says_what_is_missing():
    code = (
        "import sys, unipool, unipool.integrations\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try:\n"
        "    import unipool.integrations.transformers\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = "unipool.integrations.transformers needs transformers >= 5.17: pip install"
    assert run.stdout.startswith(wanted)
