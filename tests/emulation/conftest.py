# SPDX-License-Identifier: Apache-2.0
"""Every test of kernels runs in both flavours of the emulator; without a compiler or the CUDA
headers they are skipped."""

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from emulib import FLAVOURS, Lib, build, launchers_library  # noqa: E402
from launchers import Launchers  # noqa: E402


def _missing() -> str | None:
    if shutil.which(build.CXX) is None:
        return f"emulation: {build.CXX} not found"
    try:
        build.cuda_home()
    except build.BuildError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    if reason is None:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def ops(flavour: str) -> Launchers:
    return Launchers(Lib(launchers_library(flavour)))
