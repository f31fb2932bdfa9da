# SPDX-License-Identifier: Apache-2.0
"""`unipool doctor`: what it reports, what it notices, what it needs."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from specs import PUBLIC_OPS

import unipool
from unipool import doctor, ops, reference


def test_healthy_report():
    report = doctor.diagnose()
    assert report["ok"], report["problems"]
    assert report["torch"] == torch.__version__
    assert report["unipool"] == unipool.__version__
    assert report["build"]["compiler"]
    assert any("libunipool_cpu" in entry["file"] for entry in report["libraries"])
    assert all(entry["architectures"] for entry in report["libraries"])
    assert {r["op"] for r in report["self_test"]} == PUBLIC_OPS
    json.dumps(report)


@pytest.mark.usefixtures("one_thread")
def test_self_test_takes_about_a_second():
    """Of the processor, by one thread, and the best of three: others may be using the machine."""
    taken = []
    for _ in range(3):
        begin = time.process_time()
        results = doctor.self_test(torch, ops, reference, "cpu")
        taken.append(time.process_time() - begin)
    assert all(r["ok"] for r in results)
    assert min(taken) < 4


def scaled(function):
    """`function` with its first floating output, or its only one, 1 % too large."""

    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return result._replace(weights=result.weights * 1.01)
        return result * 1.01

    return wrong


def without_gradient(function):
    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return result._replace(weights=result.weights + 0 * result.importance.sum().detach())
        return result.detach() + 0 * result

    return wrong


def reordered(function):
    def wrong(*args, **kwargs):
        plan = function(*args, **kwargs)
        return plan._replace(order=plan.order.flip(0))

    return wrong


@pytest.mark.parametrize("op", sorted(PUBLIC_OPS - {"dispatch_plan"}))
def test_a_wrong_op_is_noticed(monkeypatch, capsys, op):
    monkeypatch.setattr(ops, op, scaled(getattr(ops, op)))
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert f"problem: {op} on cpu: greatest relative error" in output
    assert f"fix: in the source folder: {doctor.REBUILD}" in output


@pytest.mark.parametrize("op", ["permute", "grouped_mm", "expert_mlp"])
def test_a_lost_gradient_is_noticed(monkeypatch, op):
    monkeypatch.setattr(ops, op, without_gradient(getattr(ops, op)))
    failed = {r["op"] for r in doctor.diagnose()["self_test"] if not r["ok"]}
    assert op in failed


def test_a_wrong_plan_and_a_failing_op_are_noticed(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(ops, "dispatch_plan", reordered(ops.dispatch_plan))
    monkeypatch.setattr(ops, "norm_topk", failing)
    report = doctor.diagnose()
    results = {r["op"]: r for r in report["self_test"]}
    assert not results["dispatch_plan"]["ok"]
    assert results["norm_topk"]["detail"] == "first line"
    assert not report["ok"]


def test_json_output_and_exit_code(monkeypatch, capsys):
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    monkeypatch.setattr(ops, "permute", scaled(ops.permute))
    assert doctor.main(["--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_a_build_for_another_torch_is_noticed(monkeypatch):
    from unipool import _C

    info = _C.build_info()
    monkeypatch.setattr(_C, "build_info", lambda: info | {"torch": "2.9.1"})
    (problem,) = doctor.diagnose()["problems"]
    assert "built for torch 2.9.1" in problem["what"]
    assert doctor.REBUILD in problem["fix"]


def test_op_libraries_without_the_extension_module_work(monkeypatch, capsys):
    """Libraries hold no Python, so they may come from a machine with another one."""
    monkeypatch.setitem(sys.modules, "unipool._C", None)
    monkeypatch.delattr("unipool._C", raising=False)
    report = doctor.diagnose()
    assert report["ok"]
    assert report["build"] is None
    (note,) = (n for n in report["notes"] if "no build information" in n["what"])
    assert "_C" in note["what"]
    assert doctor.main([]) == 0
    assert "all ops work" in capsys.readouterr().out


HIDE = """
import importlib.abc, runpy, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
sys.argv = ["doctor", "--json"]
runpy.run_module({module!r}, run_name="__main__")
"""


@pytest.mark.parametrize("module", ["unipool.doctor", "unipool.cli"])
def test_core_install_is_enough(module):
    hidden = ("transformers", "accelerate", "typer", "rich", "matplotlib", "lm_eval")
    code = HIDE.format(hidden=hidden, module=module)
    if module == "unipool.cli":
        code = code.replace('["doctor", "--json"]', '["unipool", "doctor", "--json"]')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(report["packages"][name] is None for name in hidden)
    fixes = [note["fix"] for note in report["notes"] if "not installed" in note["what"]]
    assert fixes == ['pip install "unipool[train]"', 'pip install "unipool[eval]"']
    assert report["ok"]


def test_old_packages_and_missing_torch_are_noticed(monkeypatch):
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: "5.3.0" if name == "transformers" else "9"
    )
    notes = doctor.diagnose()["notes"]
    assert any(n["fix"] == "pip install 'transformers>=5.17'" for n in notes)
    monkeypatch.setitem(sys.modules, "torch", None)
    report = doctor.diagnose()
    assert not report["ok"]
    assert report["problems"][0]["fix"] == "pip install 'torch>=2.11'"
    assert "not installed" in doctor.render(report)


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0+cpu", (2, 13)), ("2.11.0a0+git", (2, 11)), ("3", (3,)), ("2.12.0rc1", (2, 12))],
)
def test_release_numbers(version, release):
    assert doctor.release(version) == release


def test_without_the_op_library_import_works_and_doctor_says_the_fix(tmp_path):
    environment = {**os.environ, "UNIPOOL_LIBRARY_DIR": str(tmp_path)}
    code = "import unipool\ntry: unipool.ops\nexcept ImportError as e: print(e)"
    for command, status in ((["-c", code], 0), (["-m", "unipool.doctor"], 1)):
        run = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment
        )
        assert run.returncode == status, run.stderr
        assert "libunipool_cpu.so is missing" in run.stdout
        assert "pip install --no-build-isolation" in run.stdout
        assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("shapes do not fit", doctor.REBUILD),
        ("CUDA error: no kernel image is available for execution on the device", "UNIPOOL_CUDA=ON"),
        ("CUDA error: invalid argument", "please report it"),
        ("CUDA error: an illegal memory access was encountered", "please report it"),
        ("CUDA error: out of memory", "nvidia-smi"),
    ],
)
def test_advice_fits_what_went_wrong(monkeypatch, error, advice):
    def fails(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(ops, "expert_mlp", fails)
    problems = [p for p in doctor.diagnose()["problems"] if p["what"].startswith("expert_mlp")]
    assert problems[0]["what"] == f"expert_mlp on cpu: {error}"
    assert len(problems) == 1 + torch.cuda.is_available()
    for problem in problems:
        assert advice in problem["fix"]
        assert (doctor.REBUILD in problem["fix"]) == (advice in (doctor.REBUILD, "UNIPOOL_CUDA=ON"))
