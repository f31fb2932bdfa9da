# SPDX-License-Identifier: Apache-2.0
"""The README's Python blocks run as written, and its commands name options that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
COMMANDS = re.findall(r"^unipool (\w+)(.*)$", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block(block, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    if loss := re.search(r"loss ([0-9.]+)", run.stdout):
        assert float(loss.group(1)) < 0.25  # it was about 1 before the training


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize(("command", "rest"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_command_options_exist(command, rest):
    text = subprocess.run(
        [sys.executable, "-m", "unipool.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "", "HOME": str(ROOT)},
    ).stdout
    for option in re.findall(r"--[a-z-]+", rest.split("#")[0]):
        assert option in text, f"unipool {command} has no {option}"


def test_figures_are_those_of_the_committed_results():
    script = ROOT / "bench" / "update_docs.py"
    run = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
