# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_check.sh and its parts, as far as they can be tested without a GPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
sys.path.insert(0, str(ROOT / "bench"))

import bench_experts  # noqa: E402
import bench_kernels  # noqa: E402
import compare_backends  # noqa: E402
import gpu_check  # noqa: E402
import gpu_package  # noqa: E402
import gpu_smoke  # noqa: E402
import hardware_table  # noqa: E402
import harness  # noqa: E402
from compare_backends import BF16, CPU, F32, Difference  # noqa: E402
from gpu_check import Check, Step  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def bash(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


# --- the program


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "OUT or --pack DIR is needed, not both"),
        (["out", "--pack", "dir"], "OUT or --pack DIR is needed, not both"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--prebuilt"], "argument --prebuilt: expected one argument"),
    ],
    ids=str,
)
def test_wrong_call_gets_the_usage(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        gpu_check.parse(arguments)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("usage: bench/gpu_check.sh ")
    assert text.endswith(f"bench/gpu_check.sh: error: {complaint}\n")


def test_prebuilt_without_libraries(tmp_path: Path) -> None:
    run = bash(SCRIPT, tmp_path / "out", "--prebuilt", tmp_path)
    assert run.returncode == 2
    assert run.stderr == f"gpu_check: {tmp_path}/lib/libunipool_cpu.so is missing\n"


def test_results_of_another_run_stay(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    run = bash(SCRIPT, tmp_path)
    assert run.returncode == 2
    assert run.stderr == f"gpu_check: {tmp_path} holds the results of another run\n"


@without_gpu
@pytest.mark.parametrize("options", [[], ["--rehearse"]], ids=str)
def test_without_a_gpu(tmp_path: Path, options: list[str]) -> None:
    run = bash(SCRIPT, tmp_path / "out", *options)
    assert run.returncode == 2
    assert run.stderr == "gpu_check: needs an NVIDIA GPU and a CUDA torch, found none\n"
    assert not (tmp_path / "out").exists()


def test_unknown_step_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_check.chosen([Step("build", needed=True), Step("smoke"), Step("tests")], ["smok"])
    assert capsys.readouterr().err == "gpu_check: no step smok: there are build, smoke, tests\n"
    steps = [Step("build", needed=True), Step("smoke"), Step("tests")]
    assert [s.name for s in gpu_check.chosen(steps, ["smoke"])] == ["build", "smoke"]


# --- steps

ABOUT = {"rehearsal": False, "gpu": "NVIDIA X", "driver": "1", "torch": "2", "commit": "abc"}


def shell(name: str, line: str, seconds: int = 20, **options: object) -> Step:
    return Step(name, seconds, ("bash", "-c", line), **options)


def outcomes(check: Check) -> dict[str, tuple[str, str]]:
    return {o.name: (o.status, o.detail) for o in check.outcomes}


def test_how_steps_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = [
        shell("good", "echo 'all \"well\"'"),
        shell("bad", "echo first; echo broken; exit 7"),
        shell("slow", "echo begun; sleep 30", seconds=1),
        shell("silent", "echo nothing", expect="SUMMARY: 0"),
        shell("clean", "echo '=== ERROR SUMMARY: 0 errors'", expect="SUMMARY: 0"),
        shell("blind", "echo 'Device not supported'; exit 1", expect="SUMMARY: 0", tool=True),
        Step("absent", not_run="not installed"),
        shell("environment", 'echo "$GREETING"', environment={"GREETING": "hello"}),
    ]
    check = Check(tmp_path, 100, ABOUT)
    check.run(steps)
    assert outcomes(check) == {
        "good": ("passed", 'all "well"'),
        "bad": ("failed", "exit status 7; broken"),
        "slow": ("stopped", "after 1 s; begun"),
        "silent": ("failed", "its log does not say 'SUMMARY: 0'; nothing"),
        "clean": ("passed", "=== ERROR SUMMARY: 0 errors"),
        "blind": ("not run", "does not work here: Device not supported"),
        "absent": ("not run", "not installed"),
        "environment": ("passed", "hello"),
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["gpu"], summary["passed"], summary["complete"]) == ("NVIDIA X", False, False)
    assert [s["status"] for s in summary["steps"]] == [o.status for o in check.outcomes]
    assert check.exit_status == 1
    check.print_table()
    assert "bad               failed         0 s  exit status 7; broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "status"), [("at::native::fill<float>", "passed"), ("unipool::k<float>", "failed")]
)
def test_errors_of_initcheck_count_in_our_kernels_only(place: str, status: str) -> None:
    log = (
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        f"=========     at void {place}(float*)+0x10\n"
        "=========         Host Frame: unipool::permute in libunipool_cuda.so\n"
        "========= ERROR SUMMARY: 1 error\n"
    )
    step = Step("initcheck", expect="SUMMARY: 0", tool=True, ours_only=True)
    assert gpu_check.verdict(step, 9, 30, log)[0] == status
    assert gpu_check.verdict(step, 1, 30, log)[0] == "failed"


def test_time_that_is_over_is_no_failure(tmp_path: Path) -> None:
    check = Check(tmp_path, gpu_check.LEAST_SECONDS + 1, ABOUT)
    check.run([shell("first", "sleep 2"), shell("late", "true")])
    assert outcomes(check) == {
        "first": ("passed", ""),
        "late": ("not started", "the 6 s of the whole check are over"),
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["passed"], summary["complete"], check.exit_status) == (True, False, 3)


def test_a_step_that_was_stopped_is_no_failure(tmp_path: Path) -> None:
    """What a benchmark had written stays."""
    check = Check(tmp_path, 100, ABOUT)
    check.run([shell("bench", f"echo 1 > {tmp_path}/bench.json; sleep 30", seconds=1)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["passed"], summary["complete"], check.exit_status) == (True, False, 3)
    assert (tmp_path / "bench.json").exists()


def test_nothing_starts_without_what_it_needs(tmp_path: Path) -> None:
    check = Check(tmp_path, 100, ABOUT)
    check.run([shell("build", "exit 1", needed=True), shell("smoke", "true")])
    assert outcomes(check)["smoke"] == ("not started", "build did not pass")
    assert check.exit_status == 1


def test_each_result_is_written_as_it_comes(tmp_path: Path) -> None:
    """The second step finds the first one's result in the summary and in the archive."""
    out, archive = tmp_path / "out", tmp_path / "out.tar.gz"
    out.mkdir()
    check = Check(out, 100, ABOUT, archive)
    check.run([shell("one", "echo 1"), shell("two", f"cat {out}/summary.json; tar tf {archive}")])
    seen = (out / "two.log").read_text()
    statuses = [line.strip() for line in seen.splitlines() if '"status"' in line]
    assert statuses == ['"status": "passed",', '"status": "not started",']
    assert "out/one.log" in seen
    with tarfile.open(archive) as packed:
        assert "out/two.log" in packed.getnames()


def test_a_run_that_is_stopped_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from gpu_check import *\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"check = Check(Path({str(tmp_path)!r}), 100, {ABOUT!r})\n"
        "sleep = ('bash', '-c', 'echo $$; sleep 60')\n"
        "check.run([Step('one', 9, ('true',)), Step('two', 60, sleep), Step('three', 9)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "bench")
    log = tmp_path / "two.log"
    for _ in range(200):
        if log.exists() and log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [(s["status"], s["detail"]) for s in steps] == [
        ("passed", ""),
        ("stopped", "from outside"),
        ("not started", ""),
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


# --- the plan


def real_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prebuilt: bool = True) -> list[Step]:
    """With every tool there is."""
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    return gpu_check.plan(tmp_path, prebuilt, False, tmp_path / "package")


def test_order_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [s.name for s in real_plan(tmp_path, monkeypatch, prebuilt=False) if not s.not_run]
    assert steps[:3] == ["build", "smoke", "tests"]
    assert steps[3:7] == list(gpu_check.SANITIZERS)
    assert steps[7:9] == ["bench_kernels", "bench_experts"]
    assert steps[-1] == "ncu"


@pytest.mark.parametrize(("seconds", "prebuilt"), [(500, True), (530, True), (800, False)])
def test_limits_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, prebuilt: bool
) -> None:
    """Where every step takes all that it may, all are started, and none gets less than a half."""
    steps = [s for s in real_plan(tmp_path, monkeypatch, prebuilt) if not s.not_run]
    left = float(seconds)
    for i, step in enumerate(steps):
        limit = gpu_check.limit_of(steps[i:], left)
        assert limit >= max(gpu_check.LEAST_SECONDS, step.seconds / 2), step.name
        assert limit <= step.seconds
        left -= limit
    assert left > -1e-6
    smoke = next(s for s in steps if s.name == "smoke")
    assert (smoke.first, smoke.seconds <= 120) == (True, True)


def test_time_that_a_step_leaves_goes_to_those_after_it() -> None:
    steps = [Step("a", 100), Step("b", 100)]
    assert gpu_check.limit_of(steps, 120) == 60
    assert gpu_check.limit_of(steps[1:], 110) == 100
    assert gpu_check.limit_of([Step("first", 100, first=True), *steps], 120) == 100


def test_test_files_that_cannot_be_imported_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "test_x.py"
    path.write_text("import json\nimport torch\nimport cases\nfrom nowhere.at_all import f\n")
    assert gpu_check.missing_package(path) == "nowhere"
    path.write_text("def f():\n    import nowhere\n")
    assert gpu_check.missing_package(path) == ""
    monkeypatch.setattr(gpu_check.sysconfig, "get_config_var", lambda _: ".another-python.so")
    path.write_text("from unipool import ops, _C\n")
    assert gpu_check.missing_package(path) == "unipool._C"


def test_the_tests_of_cuda_are_found_in_the_whole_folder(tmp_path: Path) -> None:
    (tests,) = (s for s in gpu_check.test_steps(tmp_path, False, 4) if s.name == "tests")
    chosen = {Path(word).stem for word in map(str, tests.command) if word.endswith(".py")}
    assert {"test_large", "test_models", "test_experts", "test_contract"} <= chosen
    assert not any("softgpu" in str(word) for word in tests.command)


@without_gpu
@pytest.mark.parametrize("rehearse", [False, True], ids=["real", "rehearsal"])
def test_benchmarks_take_the_options_of_the_plan(
    tmp_path: Path,
    rehearse: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """They get as far as asking for a GPU."""
    commands = [s.command for s in gpu_check.bench_steps(tmp_path, rehearse) if not s.not_run]
    commands += [sanitizer.command for sanitizer in gpu_check.sanitizer_steps(rehearse)[:1]]
    commands.append(gpu_check.ncu_step(tmp_path, rehearse).command)
    assert len(commands) >= 6
    for command in commands:
        script, *options = map(str, command[command.index(sys.executable) + 1 :])
        name = Path(script).stem
        monkeypatch.setattr(sys, "argv", [script, *options])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(name).main()
        output = capsys.readouterr()
        assert end.value.code == 2, output.err
        assert output.out == f"{name}: needs an NVIDIA GPU and a CUDA torch, found none\n"


SMI = """#!/bin/sh
echo "NVIDIA X, 1.2, 1 MHz, 2 MHz, 3 MHz, 4 MHz, 700.00 W"
"""


def test_what_a_summary_says_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("UNIPOOL_COMMIT", "abc")
    found = {"torch": "2.11.0", "cuda": "13.0", "gpu": "X", "software": False}
    about = gpu_check.about(found, rehearse=False)
    assert (about["gpu"], about["driver"], about["rehearsal"]) == ("NVIDIA X", "1.2", False)
    assert about["clocks"]["clocks.max.sm"] == "3 MHz"
    assert about["commit"].removesuffix("-dirty") == "abc"
    assert gpu_check.about(found, rehearse=True)["rehearsal"]
    software = gpu_check.about(found | {"software": True, "gpu": "soft"}, rehearse=False)
    assert (software["gpu"], software["rehearsal"]) == ("soft", True)


# --- the package


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder of libraries with debugging symbols in them."""
    folder = tmp_path / "built"
    folder.mkdir()
    source = tmp_path / "a.c"
    source.write_text("int answer(void) { return 42; }\n")
    for name in gpu_package.LIBRARIES:
        command = ["cc", "-g", "-shared", "-fPIC", source, "-o", folder / name]
        subprocess.run(command, check=True)
    return folder


def test_package_is_stripped_and_says_its_torch(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"torch": "2.11.0", "ops": 3, "missing": []}
    monkeypatch.setattr(gpu_package, "loaded", lambda _: found)
    gpu_package.pack(tmp_path / "package", built)
    for name in gpu_package.LIBRARIES:
        assert b".debug_info" not in (tmp_path / "package" / "lib" / name).read_bytes()
        assert b"answer" in (tmp_path / "package" / "lib" / name).read_bytes()
    about = json.loads((tmp_path / "package" / "package.json").read_text())
    assert (about["torch"], about["ops"]) == ("2.11.0", 3)
    found["missing"] = ["unipool::permute"]
    with pytest.raises(SystemExit, match="no CUDA kernel for unipool::permute"):
        gpu_package.pack(tmp_path / "package", built)


def test_package_that_is_too_large_or_does_not_load(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="the libraries do not load: "):
        gpu_package.pack(tmp_path / "package", built)
    monkeypatch.setattr(gpu_package, "LIMIT", 2**20)
    with pytest.raises(SystemExit, match=r"and the repository are .* MiB, more than 1: compile"):
        gpu_package.pack(tmp_path / "package", built)
    (built / "libunipool_cuda.so").unlink()
    with pytest.raises(SystemExit, match=r"libunipool_cuda\.so is missing"):
        gpu_package.pack(tmp_path / "package", built)


# --- docs/hardware.md


def results_of(folder: Path, failed: int = 0, **changes: object) -> Path:
    """As a run of gpu_check leaves them."""
    folder.mkdir()
    steps = [{"name": "memcheck", "status": "passed"}, {"name": "racecheck", "status": "not run"}]
    steps.append({"name": "tests", "status": "passed"})
    summary = {"rehearsal": False, "gpu": "NVIDIA X", "driver": "580", "commit": "0123456789abc"}
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": steps, **changes}))
    results = [
        {"op": "permute", "compared": 20, "failed": [{}] * failed},
        {"op": "unpermute_weighted", "compared": 22, "failed": []},
    ]
    smoke = {"environment": {"rehearsal": False}, "results": results, "raised": []}
    (folder / "smoke.json").write_text(json.dumps(smoke))
    return folder


PAGE = """# Hardware

| kernel | software | GPU, driver, commit |
| --- | --- | --- |
| `permute`, `unpermute` | all | not yet run |
| `expert_mlp` and backward | some | not yet run |

| other | table |
| --- | --- |
| `permute` | stays |
"""


def test_rows_of_the_hardware_page(tmp_path: Path) -> None:
    page = hardware_table.updated(PAGE, [hardware_table.load(results_of(tmp_path / "a"))])
    wanted = "NVIDIA X, 580, 012345678: 42 results as on the CPU; memcheck clean; all tests pass"
    assert page == PAGE.replace("| all | not yet run |", f"| all | {wanted} |")
    assert hardware_table.updated(page, []) == PAGE


def test_hardware_page_says_what_failed(tmp_path: Path) -> None:
    folder = results_of(tmp_path / "a", failed=2)
    smoke = json.loads((folder / "smoke.json").read_text())
    smoke["raised"] = ["expert_mlp ragged torch.float16: CUDA error"]
    (folder / "smoke.json").write_text(json.dumps(smoke))
    page = hardware_table.updated(PAGE, [hardware_table.load(folder)])
    assert "**2 of 42 results differ from the CPU's**; memcheck clean" in page
    assert page.count("**1 calls failed**") == 1


def test_last_run_of_each_gpu_counts(tmp_path: Path) -> None:
    folders = [
        results_of(tmp_path / "1", failed=1),
        results_of(tmp_path / "2"),
        results_of(tmp_path / "3", gpu="NVIDIA Y"),
    ]
    page = hardware_table.updated(PAGE, [hardware_table.load(f) for f in folders])
    assert "differ" not in page
    assert page.count("<br>NVIDIA Y") == 1


@pytest.mark.parametrize("file", ["summary.json", "smoke.json"])
def test_rehearsal_never_gets_into_the_hardware_page(tmp_path: Path, file: str) -> None:
    folder = results_of(tmp_path / "a")
    found = json.loads((folder / file).read_text())
    place = found["environment"] if file == "smoke.json" else found
    place["rehearsal"] = True
    (folder / file).write_text(json.dumps(found))
    target = tmp_path / "page.md"
    command = [sys.executable, ROOT / "bench" / "hardware_table.py", folder, "--to", target]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.endswith("a: a rehearsal says nothing about a GPU\n")
    assert not target.exists()


def test_the_page_itself_has_the_column() -> None:
    page = hardware_table.PAGE.read_text()
    assert hardware_table.updated(page, hardware_table.committed_runs()) == page


# --- its parts


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
        "grouped_mm, eager glue",
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
    for names in (gpu_smoke.NAMES, gpu_smoke.EXPERT_NAMES, gpu_smoke.FEW_NAMES):
        assert gpu_smoke.named(names)
    assert set(gpu_check.REHEARSAL_CASES) <= set(compare_backends.cases.BY_NAME)


def test_smoke_takes_every_tile_of_an_h100() -> None:
    _C = pytest.importorskip("unipool._C")
    for case in gpu_smoke.LARGE:
        rows, D, F, M = case.tokens * case.top_k, case.d_model, case.d_ff, case.experts
        products = [("rows", 2 * F, D), ("rows", D, F), ("rows_bwd", F, D), ("rows_bwd", D, 2 * F)]
        tiles = {_C.choose_gemm_tile(kind, rows, M, n, k) for kind, n, k in products}
        assert tiles == {case.name.replace("tiles_of_", "t")}
    assert _C.choose_gemm_tile("wgrad", rows, M, D, F) == "t128"


def test_smoke_goes_on_after_an_op_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = compare_backends.cases
    pairs = cases.pairs([cases.PERMUTE, cases.UNPERMUTE], gpu_smoke.named(("dropped",)))

    def run(backend: object, spec: object, case: object, dtype: torch.dtype) -> dict:
        if backend is compare_backends.CUDA and spec is cases.PERMUTE:
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_of_a_cuda_call_are_taken_by_events() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    found, host_share = harness.interleave_on_gpu(ways, warmup=1, runs=3)
    assert "".join(calls) == "ab" + "ababab"
    assert [(t.name, t.runs) for t in found] == [("a", 3), ("b", 3)]
    assert all(t.median >= 0 for t in found)
    assert host_share > 0


def test_relative_error_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PIECE", 7)
    wanted = torch.randn(5, 9)
    got = wanted + 0.01 * torch.randn(5, 9)
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert harness.relative_error(got, wanted) == pytest.approx(error.item(), rel=1e-12)
    assert harness.relative_error(wanted.bfloat16(), wanted.bfloat16()) == 0
    with pytest.raises(ValueError, match=r"shapes \[5, 9\] and \[1, 9\]"):
        harness.relative_error(got, wanted[:1])


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
