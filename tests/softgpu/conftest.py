# SPDX-License-Identifier: Apache-2.0
"""The package of the software GPU, wherever these tests run; numpy is all that those of PTX need
beside it. Tests of kernels get the project's by their launchers."""

import sys
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def kernels():
    """Kernels in which faults are planted (planted.cu)."""
    from planted import Planted, build

    return Planted(build())


@pytest.fixture
def says(capfd: pytest.CaptureFixture) -> Callable[..., None]:
    """Checks that stderr has one line since the last time, with these words; none: no line."""

    def check(*words: str) -> None:
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == bool(words), lines
        for word in words:
            assert lines[0].startswith("softgpu: ")
            assert word in lines[0], f"{word!r} is not in {lines[0]!r}"

    capfd.readouterr()
    return check
