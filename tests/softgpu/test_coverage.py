# SPDX-License-Identifier: Apache-2.0
"""`python -m softgpu.coverage`, on a library of two small kernels for two architectures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptx_kernels import needs_build

from softgpu import coverage, ptx

pytestmark = needs_build

SOURCE = ["out[0] = in[0];", "if (in[0] == 7)", "  out[0] += 1;", "other();"]
HEAD = '.version 9.0\n.target {}\n.address_size 64\n.file 1 "/somewhere/toy.cu"\n'
# The three instructions of line 3 run if the argument is 7.
CHOOSE = """
.visible .entry choose(.param .u64 out, .param .u32 value
)
{
.reg .b32 %r<4>; .reg .b64 %rd<2>; .reg .pred %p;
.loc 1 1 0
ld.param.u64 %rd0, [out];
ld.param.u32 %r0, [value];
.loc 1 2 0
setp.ne.u32 %p, %r0, 7;
@%p bra DONE;
.loc 1 3 0
mov.u32 %r1, 1;
add.u32 %r0, %r0, %r1;
st.global.u32 [%rd0], %r0;
DONE:
ret;
}
"""
OTHER = """
.visible .entry other(.param .u64 out
)
{
.reg .b32 %r<4>;
.loc 1 4 0
mov.u32 %r0, VALUE;
ret;
}
"""
# `choose` is one code for both architectures, `other` is not.
PTX = {
    name: HEAD.format(name) + CHOOSE + OTHER.replace("VALUE", value)
    for name, value in [("sm_80", "1"), ("sm_90a", "2")]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "libtoy.so").write_bytes(b"\0".join(t.encode() for t in PTX.values()) + b"\0")
    (tmp_path / "toy.cu").write_text("\n".join(SOURCE))
    (tmp_path / "unexecuted.toml").write_text("")
    return tmp_path


def launch(folder: Path, architecture: str, kernel: str, value: int = 0) -> None:
    """Appends what one launch executed to folder/coverage."""
    arguments = [np.zeros(1, np.uint32)]
    if kernel == "choose":
        arguments.append(np.uint32(value))
    row = ptx.run_ptx(PTX[architecture], kernel, 1, 32, arguments)["coverage"]
    with (folder / "coverage").open("a") as file:
        file.write(json.dumps(row) + "\n")


def report(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "softgpu.coverage", folder / "coverage", "--libraries", folder]
    command += ["--sources", folder, "--unexecuted", folder / "unexecuted.toml", *options]
    package = Path(coverage.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def complaints(folder: Path, percent: str = "100") -> list[str]:
    run = report(folder, "--require", percent)
    lines = run.stderr.splitlines()
    assert run.returncode == (1 if lines else 0), run.stderr
    return [line.removeprefix("coverage: ") for line in lines]


def launch_all(folder: Path, value: int) -> None:
    launch(folder, "sm_90a", "choose", value)
    for architecture in PTX:
        launch(folder, architecture, "other")


def test_all_is_executed(folder):
    launch_all(folder, 7)
    assert complaints(folder) == []
    rows = [line.split("  ") for line in report(folder).stdout.splitlines()[:4]]
    rows = [[cell.strip() for cell in row if cell] for row in rows]
    assert rows[1] == ["choose", *["1 of 1", "100.00% of 8"] * 2]
    assert rows[3] == ["all", *["2 of 2", "100.00% of 10"] * 2]


def test_files_add_up(folder):
    """A launch that misses nothing of its own does not undo another one's."""
    launch_all(folder, 7)
    launch_all(folder, 5)
    assert complaints(folder) == []


def test_code_that_never_ran_is_named_by_its_source_line(folder):
    launch_all(folder, 5)
    missed = "toy.cu:3: out[0] += 1;: 6 instructions in 2 of choose [not listed]"
    assert complaints(folder, "70") == [f"never executed: {missed}"]
    assert complaints(folder)[1:] == [
        f"{name}: 70.00% of the instructions executed, not 100%" for name in PTX
    ]
    assert missed in report(folder).stdout
    explained = report(folder, "--explain").stdout
    assert "choose (sm_80)" in explained
    assert "add.u32 %r0, %r0, %r1" in explained


def test_a_kernel_that_never_ran_is_named(folder):
    launch(folder, "sm_80", "choose", 7)
    launch(folder, "sm_90a", "other")
    assert complaints(folder, "80") == ["never launched: other (sm_80) [not listed]"]


def test_listed_code_needs_not_run(folder):
    launch_all(folder, 5)
    entry = """[[unexecuted]]
    reason = "nobody passes 7"
    kernel = "cho*"
    source = "toy.cu:*: out?0? += 1;"
    ptx = "mov.*"
    """
    (folder / "unexecuted.toml").write_text(entry)
    assert complaints(folder, "70") == []
    assert "[nobody passes 7]" in report(folder).stdout


def test_an_entry_of_executed_code_is_an_error(folder):
    launch_all(folder, 7)
    entry = '[[unexecuted]]\nreason = "nobody passes 7"\nsource = "toy.cu:3*"\n'
    (folder / "unexecuted.toml").write_text(entry)
    found = complaints(folder)
    assert found == ['listed, but executed after all or no code at all: source "toy.cu:3*"']


def test_measured_with_another_library(folder):
    launch_all(folder, 7)
    (folder / "libtoy.so").write_bytes(PTX["sm_90a"].replace("other", "another").encode() + b"\0")
    run = report(folder)
    assert run.returncode == 1
    assert run.stderr.startswith("coverage: other is not in these libraries")
    (folder / "libtoy.so").write_bytes(b"nothing")
    assert report(folder).stderr.startswith("coverage: no PTX in ")
