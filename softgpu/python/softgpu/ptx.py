# SPDX-License-Identifier: Apache-2.0
"""Runs PTX from Python, with numpy arrays as the device's memory; torch is not needed.

y = numpy.zeros(32, numpy.float32)
run_ptx(text, "kernel", grid=1, block=32, arguments=[x, y, numpy.int32(5)], shared=1024)
"""

import ctypes
import json
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LIB = Path(__file__).resolve().parents[3] / "build" / "softgpu"


class PtxError(RuntimeError):
    """What the interpreter reports: one line with kernel, block, lanes and line of the PTX."""


def library() -> ctypes.CDLL:
    """The software GPU's runtime; the same one that torch has loaded, if it has."""
    return ctypes.CDLL(str(LIB / "libcudart.so.13"))


def ask(function: str, *arguments: object) -> str:
    """Calls a function that answers with a text."""
    f = getattr(library(), function)
    f.restype = ctypes.c_char_p
    answer = f(*arguments).decode()
    if answer.startswith("error: "):
        raise PtxError(answer.removeprefix("error: "))
    return answer


class _Memory:
    """Copies of arrays as an allocation of the device has them: aligned to 256 bytes, and with a
    page behind their last 256 bytes that cannot be touched."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def address(self, array: np.ndarray) -> int:
        if not array.flags.c_contiguous:
            raise ValueError("an argument is not contiguous")
        if id(array) not in self.copies:
            page = mmap.PAGESIZE
            size = -(-max(array.nbytes, 1) // 256) * 256
            pages = -(-size // page) * page
            memory = np.frombuffer(mmap.mmap(-1, pages + page), np.uint8)
            end = memory.ctypes.data + pages
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0)
            copy = memory[pages - size : pages - size + array.nbytes]
            copy[:] = np.frombuffer(array.tobytes(), np.uint8)
            self.copies[id(array)] = array, copy
        return self.copies[id(array)][1].ctypes.data

    def copy_back(self) -> None:
        for array, copy in self.copies.values():
            if array.flags.writeable:
                array[...] = copy.view(array.dtype).reshape(array.shape)


def _bytes(argument: object, memory: _Memory) -> bytes:
    """An array is passed as its address, a numpy scalar or bytes as they are."""
    if isinstance(argument, np.ndarray):
        return memory.address(argument).to_bytes(8, "little")
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, bytes):
        return argument
    raise TypeError(f"an argument of type {type(argument).__name__}: give an array or numpy scalar")


def _dim(size: int | Sequence[int]) -> ctypes.Array:
    sizes = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


def run_ptx(
    text: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence[object],
    shared: int = 0,
    settings: str = "",
) -> dict:
    """Launches a kernel of a PTX text; returns its profile (with "profile=1" in the settings) and
    its coverage. The arrays are copied to the device and back. Settings are those of SOFTGPU_*:
    "check=1 order=random:7 async=early profile=1". Raises PtxError.
    """
    memory = _Memory()
    values = [_bytes(a, memory) for a in arguments]
    try:
        answer = ask(
            "softgpu_run_ptx",
            text.encode(),
            kernel.encode(),
            _dim(grid),
            _dim(block),
            b"".join(values),
            (ctypes.c_size_t * max(1, len(values)))(*map(len, values)),
            ctypes.c_size_t(len(values)),
            ctypes.c_size_t(shared),
            settings.encode(),
        )
    finally:
        memory.copy_back()
    profile, coverage = map(json.loads, answer.splitlines())
    return {"profile": profile, "coverage": coverage}


def known_opcodes() -> set[str]:
    """First parts ("add") of all opcodes that the interpreter knows."""
    return set(ask("softgpu_ptx_opcodes").split())


def of_library(path: str | Path) -> list[tuple[str, str]]:
    """The PTX in a library built with nvcc --compress-mode=none: pairs of architecture and text."""
    data = Path(path).read_bytes()
    texts = []
    for m in re.finditer(rb"\.version [0-9.]+\s+\.target (\w+)", data):
        end = data.index(b"\0", m.start())
        texts.append((m[1].decode(), data[m.start() : end].decode()))
    return texts


STATEMENT = re.compile(r"(?:@!?[%\w]+\s+)?([a-z]\w*(?:(?:\.|::)\w+)*)(?=\s|$)")


def opcodes(ptx: str) -> set[str]:
    """All opcodes in a PTX text, in full: "add.rn.f32"."""
    found = set()
    for statement in re.split(r"[;{}]", re.sub(r"//[^\n]*", "", ptx)):
        body = re.sub(r"^\s*(?:\.loc[^\n]*\s+|\$?\w+:\s+)*", "", statement)
        if (m := STATEMENT.match(body)) and not body.startswith("."):
            found.add(m[1])
    return found
