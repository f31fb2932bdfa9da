# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_check.sh without a GPU: the program, its steps and its plan."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Check, Step

ROOT = Path(__file__).resolve().parents[2]


SCRIPT = ROOT / "bench" / "gpu_check.sh"

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def bash(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


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


ABOUT = {"rehearsal": False, "gpu": "NVIDIA X", "driver": "1", "torch": "2", "commit": "abc"}


def shell(name: str, line: str, seconds: int = 9000, **options: object) -> Step:
    return Step(name, seconds, ("bash", "-c", line), **options)


def outcomes(check: Check) -> dict[str, tuple[str, str]]:
    return {o.name: (o.status, o.detail) for o in check.outcomes}


def test_how_steps_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = [
        shell("good", "echo 'all \"well\"'"),
        shell("bad", "echo first; echo broken; exit 7"),
        shell("slow", "sleep 9000", seconds=1),
        shell("silent", "echo nothing", expect="SUMMARY: 0"),
        shell("clean", "echo '=== ERROR SUMMARY: 0 errors'", expect="SUMMARY: 0"),
        shell("blind", "echo 'Device not supported'; exit 1", expect="SUMMARY: 0", tool=True),
        Step("absent", not_run="not installed"),
        shell("environment", 'echo "$GREETING"', environment={"GREETING": "hello"}),
    ]
    check = Check(tmp_path, 90_000, ABOUT)
    check.run(steps)
    assert outcomes(check) == {
        "good": ("passed", 'all "well"'),
        "bad": ("failed", "exit status 7; broken"),
        "slow": ("stopped", "after 1 s"),
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
    row = r"^bad {15}failed +\d+ s  exit status 7; broken$"
    assert re.search(row, capsys.readouterr().out, re.M)


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
    check = Check(tmp_path, 90_000, ABOUT)
    (tmp_path / "bench.json").write_text("1")
    check.run([shell("bench", "sleep 9000", seconds=1)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["passed"], summary["complete"], check.exit_status) == (True, False, 3)
    assert (tmp_path / "bench.json").exists()


def test_nothing_starts_without_what_it_needs(tmp_path: Path) -> None:
    check = Check(tmp_path, 90_000, ABOUT)
    check.run([shell("build", "exit 1", needed=True), shell("smoke", "true")])
    assert outcomes(check)["smoke"] == ("not started", "build did not pass")
    assert check.exit_status == 1


def test_each_result_is_written_as_it_comes(tmp_path: Path) -> None:
    """The second step finds the first one's result in the summary and in the archive."""
    out, archive = tmp_path / "out", tmp_path / "out.tar.gz"
    out.mkdir()
    check = Check(out, 90_000, ABOUT, archive)
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
        f"check = Check(Path({str(tmp_path)!r}), 20000, {ABOUT!r})\n"
        "sleep = ('bash', '-c', 'echo $$; sleep 9000')\n"
        "check.run([Step('one', 9000, ('true',)), Step('two', 9000, sleep), Step('three', 9)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "bench")
    log = tmp_path / "two.log"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [(s["status"], s["detail"]) for s in steps] == [
        ("passed", ""),
        ("stopped", "from outside"),
        ("not started", ""),
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


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
    assert {"test_large", "test_models", "test_expert_mlp", "test_contract"} <= chosen
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
