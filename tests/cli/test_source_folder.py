# SPDX-License-Identifier: Apache-2.0
"""A source folder without built ops hides an installed package: the error says so."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unipool

pytestmark = pytest.mark.any_device


def test_the_error_names_the_folder_and_the_ways_out(tmp_path):
    package = Path(unipool.__file__).parent
    shutil.copytree(package, tmp_path / "unipool", ignore=shutil.ignore_patterns("*.so", "lib"))
    (tmp_path / "CMakeLists.txt").touch()
    run = subprocess.run(
        [sys.executable, "-c", "from unipool import ops"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ""},
    )
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1
    assert f"{tmp_path} is a source folder whose ops were not built" in last
    assert "run Python from another folder" in last
    assert "pip install --no-build-isolation -e ." in last
