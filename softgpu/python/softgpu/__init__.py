# SPDX-License-Identifier: Apache-2.0
"""What the software GPUs look like from Python. `import torch` calls install() by itself where this
folder is in the path (build.py sees to it).

    calls()     the calls of the runtime that a block makes
    number()    what calls() names a stream
    races()     accesses of two streams that nothing orders
    placed()    where in its pages fresh memory lies
    damaged()   how many allocations something was written around
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LIB = Path(__file__).resolve().parents[3] / "build" / "softgpu"


def run_ptx(*args: object, **kwargs: object) -> dict:
    """softgpu.ptx.run_ptx; numpy is imported only here."""
    from softgpu.ptx import run_ptx

    return run_ptx(*args, **kwargs)


def install() -> None:
    """Hands torch's cuda operations to the CPU."""
    import torch

    # Whoever has this folder in the path may be a program of another environment.
    if torch.version.cuda is None or os.environ.get("SOFTGPU") == "runtime-only":
        return
    torch.ops.load_library(LIB / "libsoftgpu_torch.so")
    # The one form of attention that is made of operations which the CPU has.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


@cache
def runtime() -> ctypes.CDLL:
    """The runtime that torch uses."""
    library = ctypes.CDLL("libcudart.so.13")
    library.softgpu_log_text.restype = ctypes.c_char_p
    library.softgpu_races.restype = ctypes.c_char_p
    return library


def number(stream: object) -> int:
    """What calls() names a torch.cuda.Stream: 0 for the default stream of a device."""
    return runtime().softgpu_number(ctypes.c_void_p(stream.cuda_stream))


@contextmanager
def calls() -> Iterator[list[dict[str, str]]]:
    """The calls that the block makes, as {"call": "launch", "stream": "0", ...}: launch, malloc,
    free, memcpy, memcpy_async, memset_async, event_record, event_synchronize, stream_wait_event,
    stream_synchronize, device_synchronize, begin_capture, graph_launch, occupancy; and operation,
    one of torch's own. Filled when the block ends."""
    runtime().softgpu_log(1)
    made: list[dict[str, str]] = []
    try:
        yield made
    finally:
        for line in runtime().softgpu_log_text().decode().splitlines():
            head, _, kernel = line.partition(" kernel=")
            name, *fields = head.split()
            made.append({"call": name, **dict(f.split("=") for f in fields)})
            if kernel:
                made[-1]["kernel"] = kernel
        runtime().softgpu_log(0)


@contextmanager
def races() -> Iterator[list[str]]:
    """Checks the order of streams in the block, and lists what it finds, a line each; what came
    before the block is taken as done. Filled when the block ends. See the README."""
    runtime().softgpu_check_streams(1)
    found: list[str] = []
    try:
        yield found
    finally:
        found += runtime().softgpu_races().decode().splitlines()
        runtime().softgpu_check_streams(int(os.environ.get("SOFTGPU_STREAM_CHECK") or 0))


@contextmanager
def placed(where: str, alignment: int = 1) -> Iterator[None]:
    """Where cudaMalloc places memory while the block runs, in place of a GPU's 256-byte alignment.
    "end": its end, rounded up to the alignment, is at a page that cannot be touched, so that every
    access past it faults; "begin": it begins after such a page, so that every access before it
    does. torch asks cudaMalloc for each tensor after torch.cuda.caching_allocator_enable(False)."""
    runtime().softgpu_place(ctypes.c_size_t({"end": alignment, "begin": 0}[where]))
    try:
        yield
    finally:
        runtime().softgpu_place(ctypes.c_size_t(256))


def damaged() -> int:
    """Allocations around which something was written since it was last asked for; stderr has a line
    for each."""
    return runtime().softgpu_damaged()
