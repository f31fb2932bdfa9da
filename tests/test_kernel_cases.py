# SPDX-License-Identifier: Apache-2.0
"""Sizes that lead to every instance of the CUDA kernels and through all of its code: every tile of
the expert products, every row layout of the routers, every width of an access, more work than one
wave of blocks. On the CPU they are cases like others. What they execute of the shipped code is
measured by `python -m softgpu.coverage`."""

import pytest
import torch
from cases import (
    DISPATCH_PLAN,
    EXPERT_MLP,
    EXPERT_SPECS,
    PERMUTE,
    ROUTER_SPECS,
    UNPERMUTE,
    UNPERMUTE_WEIGHTED,
    Case,
    OpSpec,
    acc_dtype,
    expert_ids,
    oracle,
    rand,
    run,
    to_device,
)
from tolerance import Tolerance, check_close, check_results

from unipool import _C, ops, reference

TOPK_SPECS = [spec for spec in ROUTER_SPECS if spec.name != "router_logits"]


def check_inputs(spec: OpSpec, case: Case, inputs: dict, dtype, device) -> None:
    actual = run(spec, case, ops, to_device(inputs, device))
    check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)


def check_against_oracle(spec: OpSpec, case: Case, dtype, device) -> None:
    check_inputs(spec, case, spec.inputs(case, dtype), dtype, device)


# --- the expert products


def gpu_facts(device: torch.device) -> dict[str, int]:
    """What the choice of a tile depends on; for the CPU, a GPU that a few rows keep busy."""
    if device.type != "cuda":
        return {"sms": 8}
    facts = torch.cuda.get_device_properties(device)
    return {
        "sms": facts.multi_processor_count,
        "shared_bytes": facts.shared_memory_per_block_optin,
        "arch": 10 * facts.major + facts.minor,
    }


def rows_for_every_tile(products, experts: int, dtype, device) -> list[int]:
    """Numbers of rows with which each of the products, (kind, n, k), runs on every tile that it
    runs on with any number."""
    gpu, size = gpu_facts(device), min(dtype.itemsize, 4)
    fewest: dict[tuple, int] = {}
    for rows in (round(4 * 1.2**i) for i in range(60)):
        for kind, n, k in products:
            tile = _C.choose_gemm_tile(kind, rows, experts, n, k, element_bytes=size, **gpu)
            fewest.setdefault((kind, n, k, tile), rows)
    return sorted(set(fewest.values()))


def products_of(spec: OpSpec, D: int, F: int) -> list[tuple[str, int, int]]:
    """(kind, n, k) of the products over rows that an op and its backward are made of."""
    if spec is EXPERT_MLP:
        return [("rows", 2 * F, D), ("rows", D, F), ("rows_bwd", F, D), ("rows_bwd", D, 2 * F)]
    return [("rows", F, D), ("rows_bwd", D, F)]


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
@pytest.mark.parametrize(
    ("M", "k", "D", "F", "routing"),
    [
        pytest.param(2, 2, 328, 264, "one", id="long"),  # deeper and wider than any tile
        pytest.param(1, 1, 1160, 24, "dropped", id="wide"),  # tokens whose whole row is zero
        pytest.param(400, 1, 16, 16, "dropped", id="pool"),  # several experts a thread
    ],
)
def test_experts_on_every_tile(spec, M, k, D, F, routing, dtype, device):
    for rows in rows_for_every_tile(products_of(spec, D, F), M, dtype, device):
        case = Case(f"tile{rows}", -(-rows // k), M, k, D, F, routing=routing)
        check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
@pytest.mark.parametrize(
    ("T", "M", "k", "D", "F", "routing"),
    [
        pytest.param(70, 2, 2, 329, 265, "one", id="long"),
        pytest.param(70, 1, 1, 1161, 25, "dropped", id="wide"),
        pytest.param(90, 400, 1, 17, 19, "dropped", id="pool"),
    ],
)
def test_experts_element_by_element(spec, T, M, k, D, F, routing, dtype, device):
    """The same where rows are not whole words of 16 bytes: one tile has such an instance."""
    case = Case(f"elements{T}", T, M, k, D, F, routing=routing)
    check_against_oracle(spec, case, dtype, device)


def wgrad_problem(n: int, K: int, gather_grad: bool, gather_input: bool, dtype, device):
    """Arguments of grouped_wgrad for two segments, and the float64 result."""
    M, k = 3, 2
    grads, inputs, orders, offsets = [], [], [], []
    due = torch.zeros(M, n, K, dtype=torch.float64)
    for layer, T in enumerate([230, 75]):
        case = Case("wgrad", T, M, k, K, n, "dropped", seed=layer)
        p = reference.dispatch_plan(expert_ids(case), M)
        g = rand(case, "g", T if gather_grad else T * k, n).to(dtype)
        x = rand(case, "x", T if gather_input else T * k, K).to(dtype)
        g_rows = reference.permute(g, p) if gather_grad else g
        x_rows = reference.permute(x, p) if gather_input else x
        for e in range(M):
            rows = slice(int(p.offsets[e]), int(p.offsets[e + 1]))
            due[e] += g_rows[rows].double().T @ x_rows[rows].double()
        for tensors, t in ((grads, g), (inputs, x), (orders, p.order), (offsets, p.offsets)):
            tensors.append(t.to(device))
    return (grads, inputs, orders, offsets, k * gather_grad, k * gather_input), due


@pytest.mark.parametrize(
    ("n", "K", "gather_grad", "gather_input"),
    [(136, 200, False, True), (264, 392, True, False), (139, 267, False, True)],
)
def test_grouped_wgrad_on_every_tile(n, K, gather_grad, gather_input, dtype, backend, device):
    """Smaller and greater tiles, then element by element; written in either dtype, and added."""
    arguments, due = wgrad_problem(n, K, gather_grad, gather_input, dtype, device)
    terms = Tolerance(230, 0)
    check_close(backend.raw.grouped_wgrad(*arguments), due, Tolerance(230, 1), dtype)
    total = backend.raw.grouped_wgrad(*arguments, acc_dtype(dtype))
    check_close(total, due, terms, dtype)
    backend.raw.grouped_wgrad_(total, *arguments)
    check_close(total, 2 * due, terms, dtype)


# --- the routers

# Greatest M of each way to spread a row over lanes: in words of 16 bytes, then one by one.
LAYOUTS = [96, 128, 384, 512, 1024, 255, 1023]


@pytest.mark.parametrize("spec", TOPK_SPECS, ids=str)
@pytest.mark.parametrize("M", LAYOUTS)
def test_routers_on_every_row_layout(spec, M, dtype, device):
    check_against_oracle(spec, Case(f"{M}", 67, M, 16, 1, 1, logits="ties"), dtype, device)


@pytest.mark.parametrize("spec", TOPK_SPECS[:2], ids=str)
@pytest.mark.parametrize("M", LAYOUTS)
def test_norm_routers_of_extreme_rows_on_every_row_layout(spec, M, dtype, device):
    """Zero rows, and rows whose squares over- or underflow float32; float16 has no such numbers."""
    case = Case(f"{M}", 40, M, 2, 1, 1, logits="dead")
    inputs = spec.inputs(case, dtype)
    if dtype != torch.float16:
        inputs["logits"][1::4] *= 2.0**100
        inputs["logits"][2::4] *= 2.0**-100
    check_inputs(spec, case, inputs, dtype, device)


@pytest.mark.parametrize("spec", TOPK_SPECS, ids=str)
@pytest.mark.parametrize(
    ("T", "M"),
    [(13000, 96), (6500, 128), (3300, 384), (2200, 512), (1200, 1024), (3300, 255), (1200, 1023)],
)
def test_routers_of_more_tokens_than_one_wave(spec, T, M, dtype, device):
    check_against_oracle(spec, Case(f"{T}x{M}", T, M, 2, 1, 1), dtype, device)


# --- dispatch


@pytest.mark.parametrize("spec", [PERMUTE, UNPERMUTE, UNPERMUTE_WEIGHTED], ids=str)
@pytest.mark.parametrize("D", [2200, 2201, 2202])
@pytest.mark.parametrize("k", [1, 3])
def test_dispatch_of_wide_rows(spec, D, k, dtype, device):
    """More words of 16, 2 or 4, and 4 bytes than a warp moves at once."""
    check_against_oracle(spec, Case(f"wide{D}", 9, 4, k, D, 1, routing="dropped"), dtype, device)


def test_plan_of_more_slots_than_one_wave(device):
    case = Case("many_slots", 150_000, 40, 2, 1, 1, routing="dropped")
    check_against_oracle(DISPATCH_PLAN, case, torch.float32, device)
