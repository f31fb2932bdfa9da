# SPDX-License-Identifier: Apache-2.0
"""The folder softgpu/python in the path of a program whose torch has no CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PYTHON = Path(__file__).resolve().parents[2] / "softgpu" / "python"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_left_alone():
    path = os.pathsep.join(filter(None, [str(PYTHON), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", "import softgpu, torch; print(torch.cuda.is_available())"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout.strip()) == (0, "False"), run.stderr
