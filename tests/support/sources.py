# SPDX-License-Identifier: Apache-2.0
"""The files of the project, for tests of how they are kept."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not a checkout")
    return [name for name in found.stdout.split("\n") if name and (ROOT / name).is_file()]


def python_files() -> Iterator[tuple[str, ast.Module]]:
    for name in tracked():
        if name.endswith(".py"):
            yield name, ast.parse((ROOT / name).read_text(encoding="utf-8"))
