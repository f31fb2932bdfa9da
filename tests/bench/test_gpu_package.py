# SPDX-License-Identifier: Apache-2.0
"""The package of prebuilt libraries, and the page that a check on a GPU writes."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_package
import hardware_table
import pytest

ROOT = Path(__file__).resolve().parents[2]


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
