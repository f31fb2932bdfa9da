# SPDX-License-Identifier: Apache-2.0
"""Loaded by every pytest of an environment with software GPUs."""

import ctypes
import os

from softgpu import LIB

REPORTS = ("SOFTGPU_COVERAGE", "SOFTGPU_PROFILE")


def pytest_sessionfinish() -> None:
    """Writes the reports while the session still waits for this process: a worker of pytest-xdist
    is killed where it takes ten seconds to end, and on a busy machine some do."""
    if any(os.environ.get(name) for name in REPORTS):
        ctypes.CDLL(str(LIB / "libcudart.so.13")).softgpu_write_reports()
