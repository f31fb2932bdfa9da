# SPDX-License-Identifier: Apache-2.0
"""The package of the software GPU, wherever these tests run; numpy is all that those of PTX need
beside it. Tests of kernels get the project's by their launchers."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "softgpu" / "python"))


@pytest.fixture(scope="session")
def lib():
    from kernel_library import Lib, launchers_library

    return Lib(launchers_library())


@pytest.fixture(scope="session")
def ops(lib):
    from launchers import Launchers

    return Launchers(lib)
