# SPDX-License-Identifier: Apache-2.0
"""A real sweep."""

import os
import subprocess
import sys

import pytest
from sweeps import TRAINING


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, text):
    """The folder of a sweep of three models with two seeds, and its standard output."""
    root = tmp_path_factory.mktemp("compare")
    command = [sys.executable, "-m", "unipool.cli", "compare", "--pools=1,2", "--jobs=2"]
    command += ["--seeds=0,3", f"--data={text}", f"--out={root / 'sweep'}", *TRAINING]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr + run.stdout
    return root / "sweep", run.stdout
