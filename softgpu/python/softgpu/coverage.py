# SPDX-License-Identifier: Apache-2.0
"""Which PTX instructions of the kernels were executed.

A process with SOFTGPU_COVERAGE=FILE appends to FILE, when it ends, one line of JSON for each kernel
that it launched (processes that end together do not disturb each other):

    {"kernel": "_Z3addPf", "architecture": "sm_90a", "launches": 3, "total": 41,
     "missed": [[17, 260, "dispatch.cu:81", "add.s32 %r5, %r4, 1"], ...]}

`kernel` is the mangled name, `total` the number of instructions in its PTX, `missed` those that no
lane executed in this process: index (from 0), line of the PTX, source line ("file.cu:81", null
without `nvcc -lineinfo`) and text. An instruction whose guard was false in all lanes counts as
missed; a branch counts as executed once it was reached. Kernels that were never launched have no
line; inventory() makes one from their PTX.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from softgpu.ptx import ask


@dataclass(frozen=True)
class Instruction:
    index: int
    ptx_line: int
    source: str | None
    text: str


@dataclass
class Coverage:
    """Of a kernel's code for one architecture."""

    kernel: str
    architecture: str
    total: int
    launches: int = 0
    missed: dict[int, Instruction] = field(default_factory=dict)  # by index

    @property
    def executed(self) -> int:
        return self.total - len(self.missed)


Key = tuple[str, str]  # architecture, kernel


def merge(lines: Iterable[str]) -> dict[Key, Coverage]:
    """An instruction is missed if every line of its kernel misses it."""
    merged: dict[Key, Coverage] = {}
    for line in lines:
        row = json.loads(line)
        missed = {m[0]: Instruction(*m) for m in row["missed"]}
        key = (row["architecture"], row["kernel"])
        if key not in merged:
            merged[key] = Coverage(key[1], key[0], row["total"], row["launches"], missed)
            continue
        old = merged[key]
        if old.total != row["total"]:
            raise ValueError(f"{key[1]} ({key[0]}): {old.total} and {row['total']} instructions")
        old.launches += row["launches"]
        old.missed = {index: i for index, i in old.missed.items() if index in missed}
    return merged


def load(files: Iterable[str | Path]) -> dict[Key, Coverage]:
    """All that the files' processes launched."""
    return merge(line for file in files for line in Path(file).read_text().splitlines())


def inventory(ptx: str) -> dict[Key, Coverage]:
    """Every kernel of a PTX text, with all of its instructions missed."""
    return merge(ask("softgpu_ptx_inventory", ptx.encode()).splitlines())
