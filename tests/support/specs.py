# SPDX-License-Identifier: Apache-2.0
"""One specification per op, run the same way against the ops and against the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import CASES, Case, acc_dtype, expert_ids, logits, plan, pool, rand, weights
from torch import Tensor

from unipool import reference
from unipool.ops import DispatchPlan, Routing


@dataclass(frozen=True)
class Tolerance:
    """Of one result: the length of its sums, and how often a value is rounded to the dtype."""

    reduction: int
    roundings: int
    magnitude: Callable[[dict], Tensor] | float = 0.0  # of what may cancel, of each or of all rows


@dataclass(frozen=True)
class OpSpec:
    """Inputs, call and tolerances of an op. `call(module, inputs)` returns {name: result}."""

    name: str
    inputs: Callable[[Case, torch.dtype], dict[str, Tensor]]
    call: Callable[[object, dict[str, Tensor]], dict[str, Tensor]]
    differentiable: tuple[str, ...]
    tolerances: Callable[[Case], dict[str, Tolerance]]
    skip: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def upstream(case: Case, name: str, like: Tensor) -> Tensor:
    """Upstream gradient on a grid of 1/64, exact in every dtype; positive for the router's results
    (their sums over tokens then do not cancel), signed for the others. Logits are never narrower
    than float32, nor is their gradient: it has more digits than fit two bfloat16 numbers."""
    u = torch.rand(like.shape, generator=case.generator("upstream", name), dtype=torch.double)
    grid = 2**20 if name == "logits" else 64
    u = (0.25 + 1.5 * u).mul(grid).round().div(grid)
    if name in ("weights", "importance"):
        return u.to(like)
    sign = torch.rand(like.shape, generator=case.generator("sign", name)) < 0.5
    return torch.where(sign, -u, u).to(like)


def run(
    spec: OpSpec,
    case: Case,
    module: object,
    inputs: dict[str, Tensor],
    wrt: tuple[str, ...] | None = None,
) -> dict[str, Tensor | None]:
    """Results of an op and, as grad_<input>, the gradients for `wrt` (default: all)."""
    wrt = spec.differentiable if wrt is None else wrt
    leaves = {n: t.detach().requires_grad_() if n in wrt else t for n, t in inputs.items()}
    results = spec.call(module, leaves)
    roots = [n for n, t in results.items() if t.requires_grad]
    if roots:
        grads = [upstream(case, n, results[n]) for n in roots]
        torch.autograd.backward([results[n] for n in roots], grads)
    grads = {f"grad_{n}": leaves[n].grad for n in spec.differentiable}
    return {n: t.detach() for n, t in results.items()} | grads


def oracle(spec: OpSpec, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What run() must give, from the reference in float64 on the CPU."""
    exact = {
        n: t.detach().cpu().double() if t.is_floating_point() else t.cpu()
        for n, t in inputs.items()
    }
    return run(spec, case, reference, exact)


def _router_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    scale = torch.tensor(1.25, dtype=acc_dtype(dtype))
    return {"logits": logits(case, dtype), "scale": scale, "top_k": torch.tensor(case.top_k)}


def _steered_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """With a bias and about a quarter of the experts masked. Biases tie, but s + bias of experts
    that differ in both does not: s can be rational (norm 5), multiples of pi / 12 are not."""
    bias = rand(case, "bias", case.experts).mul(4).round().mul(torch.pi / 12).to(acc_dtype(dtype))
    mask = torch.rand(case.experts, generator=case.generator("mask")) < 0.25
    return _router_inputs(case, dtype) | {"bias": bias, "mask": mask}


def _with_steering(module_op: Callable, inputs: dict, *args: object, **options: object) -> dict:
    steer = {n: inputs[n] for n in ("bias", "mask") if n in inputs}
    return module_op(inputs["logits"], *args, int(inputs["top_k"]), **options, **steer)._asdict()


def _norm_topk(module: object, inputs: dict) -> dict[str, Tensor]:
    return _with_steering(module.norm_topk, inputs, inputs["scale"], calibration=3.0)


def _softmax_topk(module: object, inputs: dict) -> dict[str, Tensor]:
    return _with_steering(module.softmax_topk, inputs, renormalize=False)


def _softmax_topk_renormalized(module: object, inputs: dict) -> dict[str, Tensor]:
    return _with_steering(module.softmax_topk, inputs, renormalize=True)


def _norm_grad_magnitude(inputs: dict) -> Tensor:
    """sigma * c / ||z||: a row's gradient before the projection that may cancel it (M = 1); 0 for a
    row without a positive logit, whose gradient is exactly 0."""
    z = inputs["logits"].double()
    if "mask" in inputs:
        z = z.masked_fill(inputs["mask"], 0.0)
    size = 3.0 * inputs["scale"].double() / (torch.linalg.vector_norm(z, dim=-1) + 1e-8)
    return torch.where((z > 0).any(-1), size, 0.0)


def _softmax_grad_magnitude(inputs: dict) -> Tensor:
    """The greatest probability of a row: p * (g - <g, p>) cancels as it nears 1."""
    z = inputs["logits"].double()
    if "mask" in inputs:
        z = z.masked_fill(inputs["mask"], -torch.inf)
    return torch.softmax(z, -1).nan_to_num(0.0).amax(-1)


def _router_tolerances(magnitude: Callable[[dict], Tensor]) -> Callable[[Case], dict]:
    def tolerances(case: Case) -> dict[str, Tolerance]:
        return {
            "weights": Tolerance(case.experts, 0),
            "importance": Tolerance(case.tokens + case.experts, 0),
            "grad_logits": Tolerance(case.experts, 1, magnitude),
            "grad_scale": Tolerance(case.tokens * case.experts, 0),
        }

    return tolerances


def _logits_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    D = case.d_model
    return {
        "x": rand(case, "x", case.tokens, D).to(dtype),
        "weight": rand(case, "router", case.experts, D, std=D**-0.5).to(dtype),
    }


def _plan_inputs(case: Case) -> dict[str, Tensor]:
    return plan(case)._asdict()


def _as_plan(inputs: dict) -> DispatchPlan:
    return DispatchPlan(inputs["order"], inputs["inverse"], inputs["offsets"])


def _expert_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    gate_up, down = pool(case, dtype)
    return {
        "x": rand(case, "x", case.tokens, case.d_model).to(dtype),
        "weights": weights(case, dtype),
        "gate_up": gate_up,
        "down": down,
        "experts": expert_ids(case),
    }


def _expert_mlp(module: object, inputs: dict) -> dict[str, Tensor]:
    # load and importance are no part of (8)
    routing = Routing(inputs["weights"], inputs["experts"], None, None)
    return {"y": module.expert_mlp(inputs["x"], routing, inputs["gate_up"], inputs["down"])}


def _of_sums(case: Case, rows: int, term: float) -> Callable[[dict], Tensor]:
    """The size of a weight gradient's rows, `rows` of each expert: sums of as many terms of size
    `term` as the expert has slots, whose errors add up like them even where they cancel."""

    def magnitude(inputs: dict[str, Tensor]) -> Tensor:
        ids = inputs["experts"].flatten().long()
        kept = ids[(ids >= 0) & (ids < case.experts)]
        slots = torch.bincount(kept, minlength=case.experts).double()
        return (term * slots.sqrt()).repeat_interleave(rows)

    return magnitude


def _of_groups(rows: int) -> Callable[[dict], Tensor]:
    """Likewise, where the offsets tell how many rows an expert has, for terms of size 1 / 2."""

    def magnitude(inputs: dict[str, Tensor]) -> Tensor:
        return (0.5 * inputs["offsets"].diff().double().sqrt()).repeat_interleave(rows)

    return magnitude


def _expert_tolerances(case: Case) -> dict[str, Tolerance]:
    widths = case.d_model + case.d_ff + case.top_k
    rows = case.tokens + case.d_model + case.d_ff
    # Half the standard deviation of one term, by the variances of pool(): of one token's
    # gradient where a weight's gradient is concerned. Router weights are about 1 / sqrt(k).
    w = case.top_k**-0.5
    d_hidden = (case.d_model / (0.36 * case.d_ff)) ** 0.5 * w
    return {
        # Pre-activations, hidden, rows, sum; a gate's error grows by |1 + g (1 - sigmoid(g))|, up
        # to 2 where gates matter, which makes one rounding count as four.
        "y": Tolerance(widths, 7, 0.5),
        "grad_x": Tolerance(2 * widths, 5, 0.5),
        "grad_weights": Tolerance(2 * widths, 4, 0.5 * case.d_model**0.5),
        "grad_gate_up": Tolerance(rows, 5, _of_sums(case, 2 * case.d_ff, 0.3 * d_hidden)),
        "grad_down": Tolerance(rows, 3, _of_sums(case, case.d_model, 0.3 * w)),
    }


def _sorted_rows(case: Case, what: str, dtype: torch.dtype) -> Tensor:
    return rand(case, what, case.tokens * case.top_k, case.d_model).to(dtype)


ROUTER_LOGITS = OpSpec(
    "router_logits",
    _logits_inputs,
    lambda module, i: {"logits": module.router_logits(i["x"], i["weight"])},
    ("x", "weight"),
    lambda case: {
        "logits": Tolerance(case.d_model, 0, 0.5),
        "grad_x": Tolerance(case.experts, 1, 0.5 * (case.experts / case.d_model) ** 0.5),
        "grad_weight": Tolerance(case.tokens, 1, 0.5 * max(case.tokens, 1) ** 0.5),
    },
)
NORM_TOPK = OpSpec(
    "norm_topk",
    _router_inputs,
    _norm_topk,
    ("logits", "scale"),
    _router_tolerances(_norm_grad_magnitude),
)
NORM_TOPK_STEERED = OpSpec(
    "norm_topk_steered",
    _steered_inputs,
    _norm_topk,
    ("logits", "scale"),
    _router_tolerances(_norm_grad_magnitude),
)
SOFTMAX_TOPK = OpSpec(
    "softmax_topk",
    _router_inputs,
    _softmax_topk,
    ("logits",),
    _router_tolerances(_softmax_grad_magnitude),
)
SOFTMAX_TOPK_RENORMALIZED = OpSpec(
    "softmax_topk_renormalized",
    _steered_inputs,
    _softmax_topk_renormalized,
    ("logits",),
    _router_tolerances(_softmax_grad_magnitude),
    skip=("one_token", "all_to_one_expert", "pool_1024", "bench_small"),  # k = 1
)
DISPATCH_PLAN = OpSpec(
    "dispatch_plan",
    lambda case, dtype: {"experts": expert_ids(case), "num_experts": torch.tensor(case.experts)},
    lambda module, i: module.dispatch_plan(i["experts"], int(i["num_experts"]))._asdict(),
    (),
    lambda case: {},
)
PERMUTE = OpSpec(
    "permute",
    lambda case, dtype: (
        {"x": rand(case, "x", case.tokens, case.d_model).to(dtype)} | _plan_inputs(case)
    ),
    lambda module, i: {"rows": module.permute(i["x"], _as_plan(i))},
    ("x",),
    lambda case: {"rows": Tolerance(0, 0), "grad_x": Tolerance(case.top_k, 1)},
)
UNPERMUTE = OpSpec(
    "unpermute",
    lambda case, dtype: {"y": _sorted_rows(case, "y", dtype)} | _plan_inputs(case),
    lambda module, i: {"out": module.unpermute(i["y"], _as_plan(i))},
    ("y",),
    lambda case: {"out": Tolerance(case.top_k, 1), "grad_y": Tolerance(0, 0)},
)
UNPERMUTE_WEIGHTED = OpSpec(
    "unpermute_weighted",
    lambda case, dtype: (
        {"y": _sorted_rows(case, "y", dtype), "weights": weights(case, dtype)} | _plan_inputs(case)
    ),
    lambda module, i: {"out": module.unpermute(i["y"], _as_plan(i), i["weights"])},
    ("y", "weights"),
    lambda case: {
        "out": Tolerance(case.top_k, 1),
        "grad_y": Tolerance(1, 1),
        "grad_weights": Tolerance(case.d_model, 0, 0.5 * case.d_model**0.5),
    },
)
GROUPED_MM = OpSpec(
    "grouped_mm",
    lambda case, dtype: {
        "a": _sorted_rows(case, "a", dtype),
        "b": rand(case, "b", case.experts, case.d_ff, case.d_model, std=case.d_model**-0.5).to(
            dtype
        ),
        "offsets": plan(case).offsets,
    },
    lambda module, i: {"out": module.grouped_mm(i["a"], i["b"], i["offsets"])},
    ("a", "b"),
    lambda case: {
        "out": Tolerance(case.d_model, 1, 0.5),
        "grad_a": Tolerance(case.d_ff, 1, 0.5 * (case.d_ff / case.d_model) ** 0.5),
        "grad_b": Tolerance(case.tokens * case.top_k, 1, _of_groups(case.d_ff)),
    },
)
EXPERT_MLP = OpSpec(
    "expert_mlp",
    _expert_inputs,
    _expert_mlp,
    ("x", "weights", "gate_up", "down"),
    _expert_tolerances,
)

ROUTER_SPECS = [
    NORM_TOPK,
    NORM_TOPK_STEERED,
    SOFTMAX_TOPK,
    SOFTMAX_TOPK_RENORMALIZED,
]
DISPATCH_SPECS = [DISPATCH_PLAN, PERMUTE, UNPERMUTE, UNPERMUTE_WEIGHTED]
EXPERT_SPECS = [GROUPED_MM, EXPERT_MLP]
SPECS = [*ROUTER_SPECS, ROUTER_LOGITS, *DISPATCH_SPECS, *EXPERT_SPECS]
PUBLIC_OPS = {
    "router_logits",
    "norm_topk",
    "softmax_topk",
    "dispatch_plan",
    "permute",
    "unpermute",
    "grouped_mm",
    "expert_mlp",
}


def pairs(specs: list[OpSpec], cases: list[Case] = CASES) -> list[tuple[OpSpec, Case]]:
    return [(spec, case) for spec in specs for case in cases if case.name not in spec.skip]


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sizes passed as 0-dim integer tensors stay on the CPU: reading them must not wait."""
    return {n: t if n in ("top_k", "num_experts") else t.to(device) for n, t in inputs.items()}
