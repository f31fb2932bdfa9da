# SPDX-License-Identifier: Apache-2.0
"""Build driver: packaging only. Sources, flags and targets live in CMakeLists.txt.

Environment: UNIPOOL_CUDA (AUTO, ON, OFF), MAX_JOBS, CMAKE_ARGS, UNIPOOL_BUILD_DIR.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_SETUPTOOLS = 77  # reads the licence from pyproject.toml as it is written there now
JOB_MEMORY_GIB = 5  # a translation unit with CUTLASS in it; ordinary ones take 1


def missing_requirement() -> str | None:
    """One line that says what the build lacks and what to do about it, or None."""
    if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
        return (
            f"setuptools {setuptools.__version__} is too old: "
            f"run pip install 'setuptools>={MIN_SETUPTOOLS}'"
        )
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not installed in this environment: install it (pip install 'torch>=2.11'), "
            "then run pip install --no-build-isolation ."
        )
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed: run pip install 'pybind11>=2.13'"
    compiler = os.environ.get("CXX")
    if not any(
        shutil.which(name) for name in ([compiler] if compiler else ["c++", "g++", "clang++"])
    ):
        return (
            f"no C++ compiler found ({compiler or 'c++, g++, clang++'}): "
            "install one with C++20 (g++ >= 11 or clang++ >= 14) or set CXX"
        )
    return None


def parallel_jobs() -> int:
    """MAX_JOBS, or as many as cores and free memory allow."""
    if jobs := os.environ.get("MAX_JOBS"):
        if not jobs.isdecimal() or int(jobs) < 1:
            sys.exit(f"unipool: MAX_JOBS must be a whole number of at least 1, got {jobs!r}")
        return int(jobs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):  # not on macOS
        return cores or 1
    return max(1, min(cores or 1, int(free / JOB_MEMORY_GIB)))


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, and installs it into the package folder."""

    build_folder = Path(os.environ.get("UNIPOOL_BUILD_DIR", ROOT / "build" / "cmake"))

    def build_extension(self, ext: Extension) -> None:
        self.cmake(
            f"-S{ROOT}",
            f"-B{self.build_folder}",
            "-GNinja",
            "--log-level=NOTICE",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DUNIPOOL_VERSION={self.distribution.get_version()}",
            f"-DUNIPOOL_CUDA={os.environ.get('UNIPOOL_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        )
        self.cmake("--build", str(self.build_folder), "--parallel", str(parallel_jobs()))
        self.install_into(Path(self.get_ext_fullpath(ext.name)).resolve().parent)

    def copy_extensions_to_source(self) -> None:
        """Editable installs take the libraries from the source tree."""
        self.install_into(ROOT / "unipool")

    def install_into(self, package: Path) -> None:
        self.cmake("--install", str(self.build_folder), "--prefix", str(package))

    def cmake(self, *arguments: str) -> None:
        # The cmake and ninja of this environment, also where it is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        if (program := shutil.which("cmake", path=path)) is None or not shutil.which(
            "ninja", path=path
        ):
            sys.exit("unipool: cmake or ninja is missing: run pip install cmake ninja")
        if code := subprocess.run(
            [program, *arguments], env={**os.environ, "PATH": path}
        ).returncode:
            sys.exit(f"unipool: cmake {arguments[0]} failed with exit code {code}, see above")


if problem := missing_requirement():
    sys.exit(f"unipool: {problem}")
setup(ext_modules=[Extension("unipool._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
