# SPDX-License-Identifier: Apache-2.0
"""NVTX ranges of a training step, as a profiler sees them: through an injected recorder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unipool  # noqa: F401  (registers the ops)

STEP = """
import sys, torch
torch.set_default_device(sys.argv[1])
from unipool.nn import ExpertPool, NormRouter, pooled_moe
torch.set_num_threads(1)
pool, router = ExpertPool(4, 8, 8), NormRouter(8, 4, 2)
x, experts = torch.randn(16, 8), pool.begin_pass()
y, _ = pooled_moe(pooled_moe(x, router, experts)[0], router, experts)
y.sum().backward()
"""
EVERY_OP = (
    STEP
    + """
from unipool import ops
logits, a = torch.randn(16, 4, requires_grad=True), torch.randn(16, 8, requires_grad=True)
routing = ops.softmax_topk(logits, 2)
plan = ops.dispatch_plan(routing.experts, 4)
rows = ops.grouped_mm(ops.permute(a, plan), pool.gate_up_proj, plan.offsets)
ops.unpermute(rows, plan, routing.weights).sum().backward()
y, _ = pooled_moe(x, router, pool)
y.sum().backward(retain_graph=True)  # expert_mlp_bwd; without retain_graph it is expert_mlp_bwd_
lists = [torch.ones(32, 3)], [torch.ones(32, 5)], [], [plan.offsets]
torch.ops.unipool.grouped_wgrad_(torch.zeros(4, 3, 5), *lists, 0, 0)
"""
)
PYTHON_OPS = {"snapshot"}  # of nn/balance.py: a copy, not worth a range
FORWARD = ["router_logits", "norm_topk", "dispatch_plan", "expert_mlp"]
BACKWARD = ["expert_mlp_bwd_", "norm_topk_bwd", "router_logits_bwd"]


def nvtx_include() -> Path | None:
    """Where the extension's build found the headers (a CUDA toolkit, usually)."""
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", *nvcc_roots()):
        if root and (Path(root) / "include" / "nvtx3" / "nvToolsExt.h").exists():
            return Path(root) / "include"
    return None


def nvcc_roots() -> list[str]:
    if shutil.which("nvcc") is None:
        return []
    command = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    return [line.split("TOP=", 1)[1].strip() for line in lines if "TOP=" in line]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include = nvtx_include()
    if include is None:
        pytest.skip("no nvtx3 headers on this machine, so the ops were built without ranges")
    library = tmp_path_factory.mktemp("nvtx") / "librecorder.so"
    source = Path(__file__).with_name("nvtx_recorder.cpp")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-isystem{include}", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def record(recorder: Path, code: str, device: torch.device, file: Path) -> list[tuple[int, str]]:
    """(depth, name) of each range of the domain "unipool", in order of entry."""
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(recorder), "NVTX_RECORD": str(file)}
    subprocess.run([sys.executable, "-c", code, device.type], check=True, env=environment)
    ranges, depth = [], 0
    for line in file.read_text().splitlines():
        kind, domain, *name = line.split(" ", 2)
        if domain != "unipool":
            continue
        if kind == "push":
            ranges.append((depth, name[0]))
            depth += 1
        else:
            depth -= 1
        assert depth >= 0
    assert depth == 0, "a range was left open"
    return ranges


def test_ranges_of_a_training_step(recorder, device, tmp_path):
    ranges = record(recorder, STEP, device, tmp_path / "ranges.txt")
    assert not any(depth for depth, _ in ranges)
    names = [name for _, name in ranges]
    # Two layers forward, the same two backward, then one weight gradient of each pool tensor.
    assert names == 2 * FORWARD + 2 * BACKWARD + 2 * ["grouped_wgrad"]


def test_every_op_has_a_range(recorder, device, tmp_path):
    """A program that calls every op once at least: none goes without a range of its name."""
    ops = {name.split("::", 1)[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
           if name.startswith("unipool::")}  # fmt: skip
    ranges = record(recorder, EVERY_OP, device, tmp_path / "ranges.txt")
    assert {name for _, name in ranges} == ops - PYTHON_OPS
