# SPDX-License-Identifier: Apache-2.0
"""The smoke run and the comparison of backends."""

import json
import subprocess
import sys
from pathlib import Path

import cases
import compare_backends
import gpu_check
import gpu_smoke
import pytest
import specs
import torch
from compare_backends import BF16, CPU, F32, Difference

ROOT = Path(__file__).resolve().parents[2]


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


def test_every_case_of_the_smoke_run_exists() -> None:
    for names in (gpu_smoke.NAMES, gpu_smoke.EXPERT_NAMES, gpu_smoke.FEW_NAMES):
        assert gpu_smoke.named(names)
    assert set(gpu_check.REHEARSAL_CASES) <= set(cases.BY_NAME)


def test_smoke_takes_every_tile_of_an_h100() -> None:
    _C = pytest.importorskip("unipool._C")
    for case in gpu_smoke.LARGE:
        rows, D, F, M = case.tokens * case.top_k, case.d_model, case.d_ff, case.experts
        products = [("rows", 2 * F, D), ("rows", D, F), ("rows_bwd", F, D), ("rows_bwd", D, 2 * F)]
        tiles = {_C.choose_gemm_tile(kind, rows, M, n, k) for kind, n, k in products}
        assert tiles == {case.name.replace("tiles_of_", "t")}
    assert _C.choose_gemm_tile("wgrad", rows, M, D, F) == "t128"


def test_smoke_goes_on_after_an_op_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = specs.pairs([specs.PERMUTE, specs.UNPERMUTE], gpu_smoke.named(("dropped",)))

    def run(backend: object, spec: object, case: object, dtype: torch.dtype) -> dict:
        if backend is compare_backends.CUDA and spec is specs.PERMUTE:
            raise RuntimeError("no luck\nmore of it")
        return compare_backends.results_on(CPU, spec, case, BF16 if dtype == F32 else F32)

    monkeypatch.setattr(gpu_smoke, "context_works", lambda: True)
    found, raised = gpu_smoke.smoke(pairs, run)
    assert {d.op for d in found} == {"unpermute"}
    assert raised[0] == "permute dropped torch.float32: no luck"
    assert len(raised) == 3
    monkeypatch.setattr(gpu_smoke, "context_works", lambda: False)
    found, raised = gpu_smoke.smoke(pairs, run)
    assert (found, raised[1:]) == ([], ["the context is broken: nothing more can run"])


def test_tiles_that_ran() -> None:
    names = {f"void k<unipool::Tile<{t}, 3, 2, 2>, true>(A)" for t in ("float, 64, 64, 16",)}
    names |= {f"void k<Tile<__half, {m}, 128, 64>>(A)" for m in (128, 16)} | {"void other(int)"}
    assert gpu_smoke.tiles_of(names) == ["16x128 __half", "128x128 __half", "64x64 float"]


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
    good = compare_backends.results_on(CPU, specs.UNPERMUTE_WEIGHTED, case, F32)
    bad = {**good, "grad_y": good["grad_y"].roll(1, 0)}
    found = compare_backends.differences(
        specs.UNPERMUTE_WEIGHTED, case, F32, (CPU, bad), (CPU, good)
    )
    assert [d.result for d in found if not d.ok] == ["grad_y"]
    (result,) = compare_backends.as_results(found)
    assert result["error"]["dropped"] == max(d.error for d in found)
    assert [d["result"] for d in result["failed"]] == ["grad_y"]


def test_bound_is_wider_in_bfloat16() -> None:
    def bound(dtype: torch.dtype) -> float:
        case = cases.BY_NAME["ragged"]
        spec = specs.UNPERMUTE
        got = (CPU, compare_backends.results_on(CPU, spec, case, dtype))
        found: list[Difference] = compare_backends.differences(spec, case, dtype, got, got)
        return next(d.bound for d in found if d.result == "out")

    assert bound(F32) < 1e-4 < bound(BF16) < 0.1
