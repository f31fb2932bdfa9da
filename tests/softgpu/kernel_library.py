# SPDX-License-Identifier: Apache-2.0
"""The project's kernels behind C linkage, run under several schedules of the software GPU.

The library is linked, not compiled: it takes the kernels' objects, as the build of the op library
leaves them: the archive that `make gpu-test` makes, or the archive or folder of objects that
UNIPOOL_KERNEL_OBJECTS names.
"""

import ctypes
import fcntl
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor


def _on_software_gpu() -> bool:
    try:
        return torch.cuda.is_available() and hasattr(ctypes.CDLL("libcudart.so.13"), "softgpu_only")
    except OSError:
        return False


if not _on_software_gpu():
    pytest.skip("needs the software GPU: softgpu/README.md", allow_module_level=True)

from softgpu.kernels import Schedule, last_error, only, running  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "softgpu"
OBJECTS = "UNIPOOL_KERNEL_OBJECTS"
WRAPPED = ("cudaDeviceGetAttribute", "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags")

LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure: a kernel ran, and did something wrong

SCHEDULES = [
    Schedule("forward", "late"),
    Schedule("reverse", "early"),
    Schedule("random", "random"),
    Schedule("random", "late", 2),
    Schedule("random", "early", 3),
]
CHECKED = SCHEDULES[:2]  # also looked at by the checker, which takes several times as long


def kernel_objects() -> list[Path]:
    place = Path(os.environ.get(OBJECTS) or ROOT / "build" / "kernels" / "libunipool_kernels.a")
    objects = [p for p in (sorted(place.glob("*.o")) if place.is_dir() else [place]) if p.exists()]
    assert objects, f"no objects of the CUDA kernels in {place}; {OBJECTS} may name another place"
    return objects


@cache
def cuda_include() -> Path:
    """Headers of the toolkit that nvcc belongs to."""
    run = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    return Path(re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)[1].strip(), "include")


def launchers_library() -> Path:
    """Linked anew if an object, or the source of its C functions, is another."""
    objects, source = kernel_objects(), HERE / "kernels" / "launchers.cpp"
    parts = [*objects, source, Path(__file__), BUILD / "libcudart.so.13"]
    made_of = "".join(f"{p} {p.stat().st_mtime_ns}\n" for p in parts)
    target, stamp = BUILD / "libunipool_launchers.so", BUILD / "libunipool_launchers.txt"
    with (BUILD / "libunipool_launchers.lock").open("w") as lock:  # several processes may test
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target.exists() and stamp.exists() and stamp.read_text() == made_of):
            _link(target, source, objects)
            stamp.write_text(made_of)
    return target


def _link(target: Path, source: Path, objects: list[Path]) -> None:
    fresh = target.with_suffix(".fresh")  # the old one may be in use
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", source]
    command += ["-Wl,--whole-archive", *objects, "-Wl,--no-whole-archive"]
    command += [f"-I{CSRC / 'include'}", "-isystem", cuda_include()]
    command += [f"-Wl,--wrap={name}" for name in WRAPPED]
    command += [f"-L{BUILD}", "-l:libcudart.so.13", "-o", fresh]
    subprocess.run(list(map(str, command)), check=True)
    fresh.rename(target)


class LaunchError(RuntimeError):
    """What the software GPU says about a kernel that did something wrong."""


class RefusedError(RuntimeError):
    """A launcher, or the runtime, did not run a kernel: op and cudaError_t."""


class Lib:
    """The launchers."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))

    def call(self, op: str, args: ctypes.Structure, tensors: Iterable[Tensor]) -> None:
        """Of the device's memory, the kernels may touch these tensors and no other."""
        size = getattr(self.lib, f"size_{op}")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(args), f"{type(args).__name__} differs from the header"
        with only(tensors):
            status = getattr(self.lib, f"call_{op}")(ctypes.byref(args))
        if status == LAUNCH_FAILURE:
            raise LaunchError(f"{op}: {last_error()}")
        if status:
            raise RefusedError(f"{op}: {status}")

    def workspace_bytes(self, op: str, *sizes: object) -> int:
        size = getattr(self.lib, f"workspace_{op}")
        size.restype = ctypes.c_size_t
        return size(*sizes)


def under_schedules(run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """run() under every schedule; its results must agree to the bit."""
    first: list[Tensor] = []
    for schedule in SCHEDULES:
        with running(schedule, check=schedule in CHECKED):
            results = list(run())
        first = first or results
        for i, (a, b) in enumerate(zip(first, results, strict=True)):
            assert bits_equal(a, b), f"result {i} differs under {schedule}"
    return first


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
