# SPDX-License-Identifier: Apache-2.0
"""Sizes that lead to every instance of the CUDA kernels and through all of its code: every tile of
the expert products, every row layout of the routers, every width of an access, more work than one
wave of blocks. On the CPU they are cases like others. What they execute of the shipped code is
measured by `python -m softgpu.coverage`."""

import pytest
import torch
from cases import Case, acc_dtype, expert_ids, rand
from specs import (
    DISPATCH_PLAN,
    EXPERT_MLP,
    EXPERT_SPECS,
    PERMUTE,
    ROUTER_SPECS,
    UNPERMUTE,
    UNPERMUTE_WEIGHTED,
    OpSpec,
)
from suite import check_against_oracle
from tolerance import Tolerance, check_close

from unipool import _C, reference

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


def tiles_of(kind: str, dtype: torch.dtype) -> set[str]:
    size = min(dtype.itemsize, 4)
    tiles = [t for t in _C.gemm_tiles() if kind in t["kinds"] and t["element_bytes"] == size]
    return {t["name"] for t in tiles}


def chosen_tile(kind, rows: int, experts: int, n: int, k: int, dtype, device) -> str:
    size = min(dtype.itemsize, 4)
    gpu = gpu_facts(device)
    return _C.choose_gemm_tile(kind, rows, experts, n, k, element_bytes=size, **gpu)


def rows_for_every_tile(products, experts: int, dtype, device) -> list[int]:
    """Numbers of rows with which each of the products, (kind, n, k), runs on every tile."""
    found = {40, 300}  # more per expert than the smallest, than any tile has
    for kind, n, k in products:
        missing = tiles_of(kind, dtype)
        for rows in (round(4 * 1.2**i) for i in range(60)):
            tile = chosen_tile(kind, rows, experts, n, k, dtype, device)
            if tile in missing:
                missing.remove(tile)
                found.add(rows)
        assert not missing, f"{kind} {n} x {k} never runs on {missing}"
    return sorted(found)


def products_of(spec: OpSpec, D: int, F: int) -> list[tuple[str, int, int]]:
    """(kind, n, k) of the products over rows that an op and its backward are made of."""
    if spec is EXPERT_MLP:
        return [("rows", 2 * F, D), ("rows", D, F), ("rows_bwd", F, D), ("rows_bwd", D, 2 * F)]
    return [("rows", F, D), ("rows_bwd", D, F)]


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
@pytest.mark.parametrize(
    ("M", "k", "D", "F", "routing"),
    [
        pytest.param(4, 2, 328, 264, "one", id="long"),  # deeper and wider than any tile
        pytest.param(1, 1, 1856, 24, "dropped", id="wide"),  # tokens whose whole row is zero
        pytest.param(400, 1, 8, 8, "one", id="pool"),  # several experts per thread
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
        pytest.param(70, 2, 2, 331, 267, "one", id="long"),
        pytest.param(70, 2, 2, 329, 265, "one", id="long-by-1"),  # of a last word, one element
        pytest.param(70, 2, 2, 97, 105, "one", id="short"),
        pytest.param(100, 1, 1, 1857, 25, "dropped", id="wide"),
        pytest.param(90, 400, 1, 19, 13, "dropped", id="pool"),
    ],
)
def test_experts_element_by_element(spec, T, M, k, D, F, routing, dtype, device):
    """The same where rows are not whole words of 16 bytes: one tile has such an instance."""
    case = Case(f"elements{T}", T, M, k, D, F, routing=routing)
    check_against_oracle(spec, case, dtype, device)


WGRAD_ROWS = (430, 155)  # of the segments; enough for an expert to fill more stages than a tile has


def wgrad_sizes(dtype, device) -> list[tuple[int, int]]:
    """n and K with which a weight gradient runs on every tile, and such that rows are not whole
    words of 16 bytes."""
    missing, found = tiles_of("wgrad", dtype), [(139, 267)]
    for n, K in [(64, 136), (264, 392), (520, 776), (1032, 1544), (2056, 3080)]:
        tile = chosen_tile("wgrad", 2 * sum(WGRAD_ROWS), 3, n, K, dtype, device)
        if tile in missing:
            missing.remove(tile)
            found.append((n, K))
    assert not missing
    return found


def wgrad_problem(n: int, K: int, gather_grad: bool, dtype, device):
    """Arguments of grouped_wgrad for two segments, one operand in sorted rows and the other one
    gathered from tokens; and the float64 result."""
    M, k = 3, 2
    grads, inputs, orders, offsets = [], [], [], []
    due = torch.zeros(M, n, K, dtype=torch.float64)
    for layer, T in enumerate(WGRAD_ROWS):
        case = Case("wgrad", T, M, k, K, n, "dropped", seed=layer)
        p = reference.dispatch_plan(expert_ids(case), M)
        g = rand(case, "g", T if gather_grad else T * k, n).to(dtype)
        x = rand(case, "x", T * k if gather_grad else T, K).to(dtype)
        g_rows = reference.permute(g, p) if gather_grad else g
        x_rows = x if gather_grad else reference.permute(x, p)
        for e in range(M):
            rows = slice(int(p.offsets[e]), int(p.offsets[e + 1]))
            due[e] += g_rows[rows].double().T @ x_rows[rows].double()
        for tensors, t in ((grads, g), (inputs, x), (orders, p.order), (offsets, p.offsets)):
            tensors.append(t.to(device))
    top_k = (k, 0) if gather_grad else (0, k)
    return (grads, inputs, orders, offsets, *top_k), due


@pytest.mark.parametrize("gather_grad", [False, True])
def test_grouped_wgrad_on_every_tile(gather_grad, dtype, backend, device):
    """Written in either dtype, and added."""
    terms = 2 * sum(WGRAD_ROWS)
    for n, K in wgrad_sizes(dtype, device):
        arguments, due = wgrad_problem(n, K, gather_grad, dtype, device)
        check_close(backend.raw.grouped_wgrad(*arguments), due, Tolerance(terms, 1), dtype)
        total = backend.raw.grouped_wgrad(*arguments, acc_dtype(dtype))
        check_close(total, due, Tolerance(terms, 0), dtype)
        backend.raw.grouped_wgrad_(total, *arguments)
        check_close(total, 2 * due, Tolerance(2 * terms, 0), dtype)


def test_grouped_wgrad_takes_a_foreign_slot_for_zeros(dtype, backend, device):
    """Of rows so wide that a thread provides several words of these zeros."""
    if backend.name == "cpu":
        pytest.skip("the CPU refuses a slot that is none of its segment's")
    M, n, K, T = 2, 8, 40_000, 24
    case = Case("foreign", T, M, 1, K, n)
    p = reference.dispatch_plan(expert_ids(case), M)
    order = p.order.clone()
    order[3], order[17] = T, 2**31 - 1
    g, x = rand(case, "g", T, n).to(dtype), rand(case, "x", T, K).to(dtype)
    known = order < T
    g_rows = torch.where(known.unsqueeze(1), g, 0).double()
    x_rows = x[torch.where(known, order, 0).long()].double()
    counts = p.offsets.diff().tolist()
    pairs = zip(g_rows.split(counts), x_rows.split(counts), strict=True)
    due = torch.stack([g_e.T @ x_e for g_e, x_e in pairs])
    tensors = ([t.to(device)] for t in (g, x, order, p.offsets))
    got = backend.raw.grouped_wgrad(*tensors, 0, 1)
    check_close(got, due, Tolerance(T, 1), dtype)


# --- the routers

# Greatest M of each way to spread a row over lanes: in words of 16 bytes, then one by one.
LAYOUTS = [96, 128, 384, 512, 1024, 255, 1023]


@pytest.mark.parametrize("spec", ROUTER_SPECS, ids=str)
@pytest.mark.parametrize("M", LAYOUTS)
def test_routers_on_every_row_layout(spec, M, dtype, device):
    check_against_oracle(spec, Case(f"{M}", 67, M, 15, 1, 1, logits="ties"), dtype, device)


@pytest.mark.parametrize("spec", ROUTER_SPECS[:2], ids=str)
@pytest.mark.parametrize("M", LAYOUTS)
def test_norm_routers_of_extreme_rows_on_every_row_layout(spec, M, dtype, device):
    """Zero rows, and rows whose squares over- or underflow float32; float16 has no such numbers."""
    case = Case(f"{M}", 40, M, 2, 1, 1, logits="dead")
    inputs = spec.inputs(case, dtype)
    if dtype != torch.float16:
        inputs["logits"][1::4] *= 2.0**100
        inputs["logits"][2::4] *= 2.0**-100
    check_against_oracle(spec, case, dtype, device, inputs)


@pytest.mark.parametrize("spec", ROUTER_SPECS, ids=str)
@pytest.mark.parametrize(
    ("T", "M"),
    [(13000, 96), (6500, 128), (3300, 384), (2200, 512), (1200, 1024), (3300, 255), (1200, 1023)],
)
def test_routers_of_more_tokens_than_one_wave(spec, T, M, dtype, device):
    check_against_oracle(spec, Case(f"{T}x{M}", T, M, 2, 1, 1), dtype, device)


# --- dispatch


@pytest.mark.parametrize("spec", [PERMUTE, UNPERMUTE, UNPERMUTE_WEIGHTED], ids=str)
@pytest.mark.parametrize("D", [800, 1920, 1893, 1894])
@pytest.mark.parametrize("k", [1, 3])
def test_dispatch_of_wide_rows(spec, D, k, dtype, device):
    """More words of 16, 2 or 4, and 4 bytes than a warp moves at once."""
    check_against_oracle(spec, Case(f"wide{D}", 9, 4, k, D, 1, routing="dropped"), dtype, device)


@pytest.mark.parametrize(("T", "routing"), [(150_000, "dropped"), (210_000, "none")])
def test_plan_of_more_slots_than_one_wave(T, routing, device):
    case = Case("many_slots", T, 40, 2, 1, 1, routing=routing)
    check_against_oracle(DISPATCH_PLAN, case, torch.float32, device)
