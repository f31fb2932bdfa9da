# SPDX-License-Identifier: Apache-2.0
"""A small CUDA library whose host makes any call of the runtime, right or wrong; built by nvcc when
a test first needs it. The kernels are in planted.cu."""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

try:
    import softgpu
except ImportError:
    softgpu = None

needs_softgpu = pytest.mark.skipif(
    softgpu is None or not torch.cuda.is_available(),
    reason="no software GPU in this environment (softgpu/README.md)",
)

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("planted.cu")
BUILD = ROOT / "build" / "softgpu" / "tests"
KERNELS = ("fill", "copy", "add", "shared", "bounded", "greedy", "large")
DEFAULT = "arch=compute_80,code=[compute_80,sm_80] arch=compute_90a,code=[compute_90a,sm_90a]"


@cache
def build(architectures: str = DEFAULT, compress: str = "none") -> Path:
    """The library for nvcc's -gencode architectures."""
    name = "planted-" + "".join(c if c.isalnum() else "_" for c in architectures + compress)
    target = BUILD / f"{name}.so"
    if target.exists() and target.stat().st_mtime > SOURCE.stat().st_mtime:
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    part = BUILD / f"{name}.{os.getpid()}"  # workers may build at once
    generate = [f"-gencode={a}" for a in architectures.split()]
    mode = f"--compress-mode={compress}"
    nvcc = ["nvcc", *generate, mode, "-Xcompiler", "-fPIC", "-c", SOURCE, "-o", f"{part}.o"]
    subprocess.run(nvcc, check=True)
    runtime = ROOT / "build" / "softgpu"
    link = ["g++", "-shared", f"{part}.o", f"-L{runtime}", "-l:libcudart.so.13", "-o", f"{part}.so"]
    subprocess.run(link, check=True)
    Path(f"{part}.o").unlink()
    Path(f"{part}.so").replace(target)
    return target


class Planted:
    """Calls of the library at a path. Each returns the name of its error, "cudaSuccess" if none,
    and leaves no error behind for torch to find."""

    def __init__(self, path: Path) -> None:
        torch.cuda.init()
        self.library = ctypes.CDLL(str(path))
        self.runtime = softgpu.runtime()
        self.runtime.cudaGetErrorName.restype = ctypes.c_char_p
        self.runtime.cudaGetErrorString.restype = ctypes.c_char_p

    def name(self, error: int) -> str:
        last = self.runtime.cudaGetLastError()
        assert last == error, "cudaGetLastError says something else"
        return self.runtime.cudaGetErrorName(error).decode()

    def launch(
        self,
        kernel: str | None,
        *args: object,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] = (32, 1, 1),
        smem: int = 0,
        stream: int | None = None,
    ) -> str:
        """args: tensors, numbers (int) or ctypes values; kernel None: what is none; stream: a
        handle, by default torch's current one."""
        values = [
            a if isinstance(a, ctypes._SimpleCData | ctypes.Array) else _value(a) for a in args
        ]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        dims = [(ctypes.c_uint * 3)(*d) for d in (grid, block)]
        handle = torch.cuda.current_stream().cuda_stream if stream is None else stream
        number = -1 if kernel is None else KERNELS.index(kernel)
        return self.name(
            self.library.plant_launch(
                number, *dims, ctypes.c_size_t(smem), ctypes.c_void_p(handle), pointers
            )
        )

    def dynamic_limit(self, kernel: str, size: int) -> str:
        return self.name(self.library.plant_dynamic_limit(KERNELS.index(kernel), size))

    def occupancy(self, kernel: str, threads: int, smem: int = 0) -> int:
        blocks = ctypes.c_int()
        size = ctypes.c_size_t(smem)
        number = KERNELS.index(kernel)
        error = self.library.plant_occupancy(number, threads, size, ctypes.byref(blocks))
        assert self.name(error) == "cudaSuccess"
        return blocks.value

    def attributes(self, kernel: str) -> dict[str, int]:
        facts = (ctypes.c_int * 5)()
        error = self.library.plant_attributes(KERNELS.index(kernel), facts)
        assert self.name(error) == "cudaSuccess"
        names = ("registers", "static_shared", "max_threads", "binary_version", "ptx_version")
        return dict(zip(names, facts, strict=True))

    def call(self, function: str, *args: object) -> str:
        """A function of the runtime; integers among the args are passed as pointers are."""
        values = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in args]
        return self.name(getattr(self.runtime, function)(*values))


def _value(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else argument


def address(value: int) -> ctypes.c_void_p:
    """A pointer that is no tensor's."""
    return ctypes.c_void_p(value)
