# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_check.sh and its parts, as far as they can be tested without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
sys.path.insert(0, str(ROOT / "bench"))

import bench_experts  # noqa: E402
import bench_kernels  # noqa: E402
import compare_backends  # noqa: E402
import gpu_smoke  # noqa: E402
from compare_backends import BF16, CPU, F32, Difference  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def bash(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


# --- the script


def test_script_parses() -> None:
    assert bash("-n", SCRIPT).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["--nope"], ["a", "b"], ["a", "--prebuilt"]], ids=str)
def test_wrong_call_gets_the_usage(arguments: list[str]) -> None:
    run = bash(SCRIPT, *arguments)
    assert run.returncode == 2
    assert run.stderr == "gpu_check: usage: bench/gpu_check.sh OUT [--prebuilt DIR]\n"


def test_prebuilt_without_libraries(tmp_path: Path) -> None:
    run = bash(SCRIPT, tmp_path / "out", "--prebuilt", tmp_path)
    assert run.returncode == 2
    assert run.stderr == f"gpu_check: {tmp_path}/lib/libunipool_cpu.so is missing\n"


def test_without_a_gpu(tmp_path: Path) -> None:
    run = bash(SCRIPT, tmp_path / "out")
    assert run.returncode == 2
    assert run.stderr == "gpu_check: needs an NVIDIA GPU and a CUDA torch, found none\n"
    assert not (tmp_path / "out").exists()


STEPS = """
source "$SCRIPT"
OUT=$1; cd "$ROOT"
step good 20 echo 'all "well"' || exit 3
step bad 20 bash -c 'echo first; echo broken; exit 7' && exit 3
step slow 1 sleep 30 && exit 3
EXPECT='SUMMARY: 0' step silent 20 echo nothing && exit 3
EXPECT='SUMMARY: 0' step clean 20 echo '=== ERROR SUMMARY: 0 errors' || exit 3
TOTAL_SECONDS=0
step late 20 true && exit 3
record tool "not run" 0 "not installed"
write_summary
echo "failed=$failed"
"""
SMI = """#!/bin/sh
echo "NVIDIA X, 1.2, 1 MHz, 2 MHz, 3 MHz, 4 MHz, 700.00 W"
"""


def test_steps_and_summary(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = bash("-c", STEPS, "-", tmp_path, SCRIPT=str(SCRIPT), PATH=path, UNIPOOL_COMMIT="abc")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("failed=1\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["gpu"], summary["driver"]) == ("NVIDIA X", "1.2")
    assert summary["clocks"]["clocks.max.sm"] == "3 MHz"
    assert summary["torch"] == torch.__version__
    assert summary["commit"].removesuffix("-dirty") == "abc"
    assert summary["passed"] is False
    steps = {s["name"]: (s["status"], s["detail"]) for s in summary["steps"]}
    assert steps["good"] == ("passed", 'all "well"')
    assert steps["bad"] == ("failed", "exit status 7; broken")
    assert steps["slow"] == ("failed", "stopped after 1 s; ")
    assert steps["silent"] == ("failed", "its log does not say 'SUMMARY: 0'; nothing")
    assert steps["clean"][0] == "passed"
    assert steps["late"][0] == "failed"
    assert steps["tool"] == ("not run", "not installed")
    assert [line for line in run.stdout.splitlines() if line.startswith("bad  ")]


# --- its parts


@without_gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bench_kernels", []),
        ("bench_experts", []),
        ("gpu_smoke", []),
        ("bench_integration", ["--device", "cuda"]),
        ("pool_step", ["--device", "cuda"]),
    ],
)
def test_parts_say_that_they_need_a_gpu(name: str, options: list[str]) -> None:
    command = [sys.executable, ROOT / "bench" / f"{name}.py", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == f"{name}: needs an NVIDIA GPU and a CUDA torch, found none\n"


def test_prebuilt_libraries_need_no_extension_of_this_python(tmp_path: Path) -> None:
    """The libraries hold no Python, so the machine with the GPU may have another one."""
    parts = "compare_backends, gpu_smoke, bench_kernels, pool_step, bench_integration"
    code = (
        "import sys; sys.modules['unipool._C'] = None; sys.path.insert(0, 'bench'); "
        f"import bench_experts, {parts}; bench_experts.main()"
    )
    json_file = tmp_path / "experts.json"
    options = ["--device", "cpu", "--runs", "2", "--json", str(json_file)]
    command = [sys.executable, "-c", code, *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    (result,) = json.loads(json_file.read_text())["results"]
    assert all("predicted_seconds" not in found for found in result["products"])
    assert all(found["share_of_floor"] > 0 for found in result["products"])


def nbytes(values: list) -> int:
    """Of all tensors in a list, and of those in lists in it."""
    sizes = [nbytes(v) if isinstance(v, list) else getattr(v, "nbytes", 0) for v in values]
    return sum(sizes)


@pytest.mark.parametrize("call", bench_kernels.all_calls(), ids=lambda c: c.name)
def test_necessary_bytes_are_those_of_the_tensors(call: bench_kernels.Call) -> None:
    """At 64 tokens: what goes in and comes out, without what the op has no use for."""
    tokens = 64
    k = call.shape.get("k", 1)
    formulas = {
        "norm_topk": lambda: bench_kernels.topk_bytes(tokens, call.shape["M"], k),
        "norm_topk_bwd": lambda: bench_kernels.topk_bwd_bytes(tokens, call.shape["M"], k),
        "dispatch_plan": lambda: bench_kernels.plan_bytes(
            tokens * call.shape["layers"], call.shape["M"]
        ),
        "permute": lambda: bench_kernels.permute_bytes(tokens, k, bench_kernels.WIDTH),
        "unpermute": lambda: bench_kernels.unpermute_bytes(tokens, k, bench_kernels.WIDTH),
        "unpermute_bwd": lambda: bench_kernels.unpermute_bwd_bytes(tokens, k, bench_kernels.WIDTH),
    }
    formula = formulas[call.op.replace("softmax", "norm")]
    arguments = call.arguments(tokens)
    total = nbytes(arguments) + nbytes(bench_kernels._run(call, arguments))
    scalars = 4 * ({"norm_topk": 1, "norm_topk_bwd": 2}.get(call.op, 0))
    assert formula().necessary == total - scalars


def test_bytes_of_the_documented_shapes() -> None:
    """The figures of docs/kernels.md, in MB."""
    b = bench_kernels
    documented = [
        (b.topk_bytes(65536, 384, 1), 101.2, 103.6),
        (b.topk_bytes(65536, 96, 8), 29.4, 30.0),
        (b.topk_bwd_bytes(65536, 384, 1), 201.9, 201.9),
        (b.topk_bwd_bytes(65536, 96, 8), 54.5, 54.5),
        (b.plan_bytes(65536, 384), 0.8, 1.8),
        (b.plan_bytes(524288, 384), 6.3, 11.6),
        (b.permute_bytes(65536, 1, 1024), 268.7, 268.7),
        (b.permute_bytes(65536, 2, 1024), 403.2, 537.4),
        (b.unpermute_bytes(65536, 1, 1024), 269.0, 269.0),
        (b.unpermute_bytes(65536, 2, 1024), 403.7, 403.7),
        (b.unpermute_bwd_bytes(65536, 2, 1024), 673.2, 673.2),
    ]
    for traffic, necessary, moved in documented:
        got = (round(traffic.necessary / 1e6, 1), round(traffic.moved / 1e6, 1))
        assert got == (necessary, moved)


def test_verdicts() -> None:
    router, plan = bench_kernels.router_calls(96, 8)[0], bench_kernels.plan_call(96, 1)
    assert [bench_kernels.judge(router, 10.0, s) for s in (0.85, 0.84)] == ["pass", "short"]
    assert [bench_kernels.judge(plan, us, 0.0) for us in (30.0, 30.1)] == ["pass", "short"]
    assert bench_kernels.judge(bench_kernels.plan_call(96, 12), 99.0, 0.0) == "-"


def test_expert_benchmark_runs_on_the_cpu(capsys: pytest.CaptureFixture) -> None:
    result = bench_experts.bench(bench_experts.SMALL, 2, "cpu", compiler="eager")
    assert [p["pass"] for p in result["products"]] == ["forward", "dgrad", "wgrad"]
    assert all(p["share_of_floor"] > 0 for p in result["products"])
    assert [t["name"] for t in result["layer"]] == [
        "unipool",
        "grouped_mm, compiled glue",
        "eager loop",
        "dense matmul, equal FLOPs",
    ]
    assert "T=96 D=32 F=48 M=6 k=2" in capsys.readouterr().out


@pytest.mark.parametrize("spoilt", bench_experts.PARAMETERS)
def test_expert_benchmark_times_nothing_that_differs(spoilt: str) -> None:
    shape, place = bench_experts.SMALL, bench_experts.PARAMETERS.index(spoilt)
    step = bench_experts.layer_step(
        bench_experts.ops.expert_mlp, bench_experts.make_inputs(shape, "cpu")
    )

    def wrong() -> tuple[torch.Tensor, ...]:
        return tuple(t.roll(1, 0) if n == place else t for n, t in enumerate(step()))

    bench_experts.check({"ours": step, "same": step})
    with pytest.raises(RuntimeError, match=f"^wrong: {spoilt}: relative error .*, not timed$"):
        bench_experts.check({"ours": step, "wrong": wrong})


def test_verdicts_of_the_expert_benchmark() -> None:
    first, small = bench_experts.SHAPES[0], bench_experts.SMALL
    judge = bench_experts.judge
    assert [judge(first, "forward", s) for s in (0.55, 0.54)] == ["pass", "short"]
    assert judge(first, "dgrad", 0.1) == judge(small, "forward", 0.1) == "-"


def test_every_case_of_the_smoke_run_exists() -> None:
    for names in (gpu_smoke.NAMES, gpu_smoke.EXPERT_NAMES, gpu_smoke.FEW_EXPERT_NAMES):
        assert gpu_smoke.named(names)


def test_kernels_that_did_not_run_are_named() -> None:
    ran = {"void unipool::(anonymous namespace)::unpermute_kernel<float, 1>(Args)"}
    assert gpu_smoke.missing_kernels({"unpermute_kernel"}, ran) == []
    assert gpu_smoke.missing_kernels({"permute_kernel"}, ran) == ["permute_kernel"]
    assert {"norm_topk_kernel", "permute_kernel", "scan_kernel"} <= gpu_smoke.our_kernels()


def test_compare_tensors() -> None:
    compare = compare_backends.compare_tensors
    ints, floats = torch.tensor([1, 2]), torch.tensor([1.0, 4.0])
    assert compare(ints, ints, 0.0) == (0.0, "")
    assert compare(ints, torch.tensor([1, 3]), 0.0) == (1.0, "1 integers differ")
    assert compare(floats, torch.tensor([1.0, 5.0]), 0.0) == (0.2, "")
    assert compare(floats, torch.tensor([1.0, 5.0]), 10.0) == (0.1, "")
    assert compare(floats, torch.tensor([1.0, torch.nan]), 0.0)[1] == "NaN in other places"
    assert compare(floats, torch.zeros(2), 0.0)[1] == "zero on one side only"
    assert compare(floats, floats.double(), 0.0)[1] != ""
    assert compare(None, floats, 0.0)[1] == "missing on one side"


def test_differences_find_a_wrong_result() -> None:
    cases = compare_backends.cases
    case = cases.BY_NAME["dropped"]
    good = compare_backends.results_on(CPU, cases.UNPERMUTE_WEIGHTED, case, F32)
    bad = {**good, "grad_y": good["grad_y"].roll(1, 0)}
    found = compare_backends.differences(
        cases.UNPERMUTE_WEIGHTED, case, F32, (CPU, bad), (CPU, good)
    )
    assert [d.result for d in found if not d.ok] == ["grad_y"]
    (result,) = compare_backends.as_results(found)
    assert result["error"]["dropped"] == max(d.error for d in found)
    assert [d["result"] for d in result["failed"]] == ["grad_y"]


def test_bound_is_wider_in_bfloat16() -> None:
    def bound(dtype: torch.dtype) -> float:
        case = compare_backends.cases.BY_NAME["ragged"]
        spec = compare_backends.cases.UNPERMUTE
        got = (CPU, compare_backends.results_on(CPU, spec, case, dtype))
        found: list[Difference] = compare_backends.differences(spec, case, dtype, got, got)
        return next(d.bound for d in found if d.result == "out")

    assert bound(F32) < 1e-4 < bound(BF16) < 0.1
