# SPDX-License-Identifier: Apache-2.0
"""What the software GPUs look like from Python. `import torch` calls install() by itself where this
folder is in the path (build.py sees to it)."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIB = Path(__file__).resolve().parents[3] / "build" / "softgpu"


def run_ptx(*args: object, **kwargs: object) -> dict:
    """softgpu.ptx.run_ptx; numpy is imported only here."""
    from softgpu.ptx import run_ptx

    return run_ptx(*args, **kwargs)


def install() -> None:
    """Hands torch's cuda operations to the CPU."""
    import torch

    if os.environ.get("SOFTGPU") == "runtime-only":
        return
    torch.ops.load_library(LIB / "libsoftgpu_torch.so")
    # The one form of attention that is made of operations which the CPU has.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def number(stream: object) -> int:
    """What calls() names a torch.cuda.Stream."""
    return ctypes.CDLL("libcudart.so.13").softgpu_number(ctypes.c_void_p(stream.cuda_stream))


@contextmanager
def calls() -> Iterator[list[dict[str, str]]]:
    """The calls of the runtime that the block makes, as {"call": "launch", "stream": "0", ...}."""
    runtime = ctypes.CDLL("libcudart.so.13")
    runtime.softgpu_log_text.restype = ctypes.c_char_p
    runtime.softgpu_log(1)
    made: list[dict[str, str]] = []
    try:
        yield made
    finally:
        for line in runtime.softgpu_log_text().decode().splitlines():
            head, _, kernel = line.partition(" kernel=")
            name, *fields = head.split()
            made.append({"call": name, **dict(f.split("=") for f in fields)})
            if kernel:
                made[-1]["kernel"] = kernel
        runtime.softgpu_log(0)
