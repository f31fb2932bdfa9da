# SPDX-License-Identifier: Apache-2.0
"""How the software GPU runs kernels while a block of Python runs: schedules, the checker, and other
PTX in a kernel's place."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from softgpu.ptx import ask, library


@dataclass(frozen=True)
class Schedule:
    """What nothing in a kernel may depend on: how blocks and warps follow each other, and when an
    asynchronous copy lands (late: at its wait, early: at its issue)."""

    order: str = "forward"
    landing: str = "late"
    seed: int = 1

    def __str__(self) -> str:
        return f"{self.order}-{self.landing}-{self.seed}"

    @property
    def settings(self) -> str:
        """As SOFTGPU_* have it."""
        order, landing = (
            f"{kind}:{self.seed}" if kind == "random" else kind
            for kind in (self.order, self.landing)
        )
        return f"order={order} async={landing}"


@contextmanager
def running(schedule: Schedule, *, check: bool = False) -> Iterator[None]:
    """Launches in the block follow the schedule; `check` looks for races, shared memory that nobody
    wrote, and memory outside of `only`. Afterwards: forward, late, unchecked."""
    ask("softgpu_options", f"{schedule.settings} check={int(check)}".encode())
    try:
        yield
    finally:
        ask("softgpu_options", b"")


@contextmanager
def only(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Where the checker is on, kernels in the block may touch the memory of these tensors (one at
    least) and no other, to the byte."""
    ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    count = len(ranges)
    starts = (ctypes.c_void_p * count)(*(start for start, _ in ranges))
    sizes = (ctypes.c_size_t * count)(*(size for _, size in ranges))
    library().softgpu_only(starts, sizes, ctypes.c_size_t(count))
    try:
        yield
    finally:
        library().softgpu_only(None, None, ctypes.c_size_t(0))


@contextmanager
def override(ptx: str) -> Iterator[None]:
    """Launches in the block run the kernels of this text in the place of those with their names."""
    ask("softgpu_override", ptx.encode())
    try:
        yield
    finally:
        ask("softgpu_override", None)


def last_error() -> str:
    """What the last launch that failed said: kernel, block, what, warp, lanes, lines of PTX and
    source."""
    function = library().softgpu_last_error
    function.restype = ctypes.c_char_p
    return function().decode()
