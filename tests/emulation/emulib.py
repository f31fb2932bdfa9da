# SPDX-License-Identifier: Apache-2.0
"""Emulated kernel libraries: built on first use, called through ctypes with CPU tensors."""

import ctypes
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

KERNELS = Path(__file__).resolve().parent / "kernels"
FLAVOURS = ("fast", "check")


def _load_build() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "emulation" / "build.py"
    spec = importlib.util.spec_from_file_location("emulation_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


def launchers_library(flavour: str, mutate: Mapping[str, str] | None = None) -> Path:
    """The project's kernels behind C linkage; `mutate` replaces the text of some sources."""
    names = build.KERNELS if mutate is None else list(mutate)
    sources = [
        build.kernel_source(build.CSRC / name, flavour, text=(mutate or {}).get(name))
        for name in names
    ]
    for name in names:
        sources.append(build.kernel_source(KERNELS / f"launch_{Path(name).stem}.cpp", flavour))
    return build.library("unipool_launchers", sources, flavour)


def sample_library(name: str, flavour: str, *, cute: bool = False) -> "Lib":
    """One of the sample kernels that keep the emulator itself honest."""
    source = build.kernel_source(KERNELS / f"{name}.cu", flavour, cute=cute, extra=("-w",))
    return Lib(build.library(name, [source], flavour))


def read_source(name: str) -> str:
    return (build.CSRC / name).read_text()


def with_headers(
    source: str, header: re.Pattern[str], read: Callable[[str], str] = read_source
) -> str:
    """A source with the headers that `header` matches (group 1 their names) in place, once each:
    what faults are planted in."""
    seen: set[str] = set()

    def inline(match: re.Match[str]) -> str:
        if match.group(1) in seen:
            return ""
        seen.add(match.group(1))
        return header.sub(inline, read(match.group(1)).replace("#pragma once\n", ""))

    return header.sub(inline, read(source))


# How threads and blocks are ordered, when asynchronous copies land, seed.
SCHEDULES = [
    ("forward", "late", 1),
    ("reverse", "early", 1),
    ("random", "random", 1),
    ("random", "late", 2),
    ("random", "early", 3),
]


class LaunchError(RuntimeError):
    """What the emulator says about a launch that failed."""


class Lib:
    """A library of emulated kernels with C linkage."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.emu_last_error.restype = ctypes.c_char_p

    @property
    def checks(self) -> bool:
        """Whether this is the `check` flavour."""
        return bool(self.lib.emu_checks())

    def schedule(self, order: str = "forward", copies: str = "late", seed: int = 1) -> None:
        orders, landings = ("forward", "reverse", "random"), ("late", "early", "random")
        self.lib.emu_config(orders.index(order), landings.index(copies), seed)

    def allow(self, tensors: Sequence[Tensor]) -> None:
        """From now on, kernels may touch the memory of these tensors and no other."""
        self.lib.emu_allow_none()
        for t in tensors:
            size = ctypes.c_size_t(t.numel() * t.element_size())
            self.lib.emu_allow(ctypes.c_void_p(t.data_ptr()), size)

    def call(self, name: str, *args: object) -> None:
        """Calls a launcher: tensors as pointers, the rest as it is; a null stream comes last."""
        self.allow([a for a in args if isinstance(a, Tensor)])
        self.check(name, getattr(self.lib, name)(*map(_argument, args), None))

    def check(self, name: str, status: int) -> None:
        if status:
            raise LaunchError(f"{name}: {status}: {self.lib.emu_last_error().decode()}")


def _argument(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else value


def under_schedules(lib: Lib, run: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """run() under every schedule; its results must agree to the bit."""
    first: list[Tensor] = []
    try:
        for schedule in SCHEDULES:
            lib.schedule(*schedule)
            results = list(run())
            first = first or results
            for i, (a, b) in enumerate(zip(first, results, strict=True)):
                assert bits_equal(a, b), f"result {i} differs under schedule {schedule}"
    finally:
        lib.schedule()
    return first


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
