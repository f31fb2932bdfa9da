# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the sources of kernels, which the tests beside must find.

A fault is an edit of a source's text. CuTe takes long to compile, so all faults of a source go into
one PTX text, where each stands beside the code that it replaces. Which of them is chosen, if any,
is a number that is written into the PTX: the compiler leaves a name in its place.
"""

import fcntl
import hashlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from kernel_library import BUILD, CHECKED, CSRC, SCHEDULES, LaunchError, running
from softgpu.kernels import override

NUMBER = "UNIPOOL_PLANTED_FAULT"
SWITCH = f"""#pragma once
__device__ __forceinline__ int planted_fault() {{
  int number;
  asm("mov.u32 %0, {NUMBER};" : "=r"(number));
  return number;
}}
"""
NONE = -1
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-w", "-arch=compute_80"]


@dataclass(frozen=True)
class Fault:
    """In `file`, what is between « and » in `where` becomes `new`: a statement, or an expression.
    The check of this name must see it."""

    name: str
    check: str
    file: str
    where: str
    new: str

    def __str__(self) -> str:
        return self.name

    @property
    def old(self) -> str:
        return self.where.split("«")[1].split("»")[0]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the replaced text is: every place that reads so."""
        before, old, after = re.split("[«»]", self.where)
        places = re.finditer(re.escape(before + old + after), text)
        spans = [(m.start() + len(before), m.end() - len(after)) for m in places]
        assert spans, f"{self.name}: {self.file} no longer holds {self.where!r}"
        return spans


def plant(text: str, faults: dict[int, Fault]) -> str:
    """The text with a choice at every place that a fault replaces."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, fault in faults.items():
        for span in fault.spans(text):
            places[span].append(number)
    for start, end in sorted(places, reverse=True):
        choice = _choice(text[start:end], {n: faults[n].new for n in places[start, end]})
        text = text[:start] + choice + text[end:]
    return text


def _choice(old: str, new: dict[int, str]) -> str:
    if old.endswith(";"):
        chosen = (f"if (planted_fault() == {n}) {{ {code} }} else " for n, code in new.items())
        return "".join(chosen) + f"{{ {old} }}"
    chosen = (f"planted_fault() == {n} ? ({code}) : " for n, code in new.items())
    return f"({''.join(chosen)}({old}))"


def compile_ptx(source: str, files: dict[str, str]) -> str:
    """The PTX of one of the files, which stand before the folders of the project in the include
    path. Kept by a hash of all that may go into it."""
    files = {**files, "planted_fault.h": SWITCH}
    folder = BUILD / "planted" / f"{Path(source).stem}-{_hash(files)}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "kernels.ptx"
    with (folder / "lock").open("w") as lock:  # several processes may test at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(source, files, folder, target)
    return target.read_text()


def _hash(files: dict[str, str]) -> str:
    state = hashlib.sha256(repr((FLAGS, sorted(files.items()))).encode())
    for path in sorted([*CSRC.glob("cuda/**/*.cuh"), *CSRC.glob("include/unipool/*.h")]):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _compile(source: str, files: dict[str, str], folder: Path, target: Path) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    fresh = target.with_suffix(".fresh")
    command = ["nvcc", *FLAGS, "-ptx", folder / source, "-o", fresh]
    command += ["-include", folder / "planted_fault.h"]
    command += [f"-I{path}" for path in (folder, CSRC, CSRC / "include", cutlass_include())]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    fresh.rename(target)


@dataclass(frozen=True)
class Planted:
    """A source of csrc with its faults. `cut` shortens the text of its files: fewer instances of
    the kernels take less time."""

    source: str
    faults: Sequence[Fault]
    cut: Callable[[str], str]

    @contextmanager
    def fault(self, number: int) -> Iterator[None]:
        """Launches in the block run the kernels with one of the faults, or NONE."""
        with override(choose_fault(self._ptx, number)):
            yield

    def number(self, fault: Fault) -> int:
        return list(self.faults).index(fault)

    @cached_property
    def _ptx(self) -> str:
        by_file: dict[str, dict[int, Fault]] = defaultdict(dict)
        for number, fault in enumerate(self.faults):
            by_file[fault.file][number] = fault
        names = {self.source, "cuda/device/gemm/launch.cuh", *by_file}
        files = {n: plant(self.cut((CSRC / n).read_text()), by_file[n]) for n in names}
        return compile_ptx(self.source, files)


def choose_fault(ptx: str, number: int) -> str:
    return ptx.replace(NUMBER, str(number))


def cutlass_include() -> Path:
    """Of the nvidia-cutlass package, found without importing it."""
    for folder in map(Path, sys.path):
        include = folder / "cutlass_library" / "source" / "include"
        if (include / "cute" / "tensor.hpp").is_file():
            return include
    pytest.fail("needs the package nvidia-cutlass")


def only_dtype(kept: str, text: str) -> str:
    """A source whose switches over a dtype know one."""
    return re.sub(rf" +case DType::k(?!{kept}:)\w+:\n +return [^;]*;\n", "", text)


def fails(check: Callable[[], bool]) -> bool:
    """Whether a launch fails with a report, or a result is wrong."""
    try:
        return not check()
    except (AssertionError, LaunchError):
        return True


def is_found(check: Callable[[], bool]) -> bool:
    """Whether the check fails under any schedule."""
    for schedule in SCHEDULES:
        with running(schedule, check=schedule in CHECKED):
            if fails(check):
                return True
    return False
