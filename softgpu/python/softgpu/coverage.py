# SPDX-License-Identifier: Apache-2.0
"""Which PTX instructions of the kernels were executed.

    SOFTGPU_COVERAGE=FILE python -m pytest ...
    python -m softgpu.coverage FILE... --libraries DIR [--named 7unipool] [--require 98] [--explain]

A process with SOFTGPU_COVERAGE=FILE appends to FILE, when it ends, one line of JSON for each kernel
that it launched (processes that end together do not disturb each other):

    {"kernel": "_Z3addPf", "architecture": "sm_90a", "launches": 3, "total": 41,
     "missed": [[17, 260, "dispatch.cu:81", "add.s32 %r5, %r4, 1"], ...]}

`kernel` is the mangled name, `total` the number of instructions in its PTX, `missed` those that no
lane executed in this process: index (from 0), line of the PTX, source line ("file.cu:81", null
without `nvcc -lineinfo`) and text. An instruction whose guard was false in all lanes counts as
missed; a branch counts as executed once it was reached. Kernels that were never launched have no
line; inventory() makes one from their PTX.

The program adds up the files, for every architecture in the libraries: per family of kernels (a
template is one) how many ran and the share of their instructions that did, then the source lines of
those that never did. A kernel whose instructions are the same, letter by letter, for several
architectures is one code: what one of them executed counts for all.

Other programs' kernels in the files, of tests of the software GPU say, are left out by --named.

What cannot be executed is listed with the reason in unexecuted.toml. An entry names gaps, which are
instructions in a row that never ran, by their first one: patterns (of fnmatch) for `kernel` as it
is written in C++, `source` ("file.cu:81: text of that line") and `ptx`; one that is left out fits
all. With --require each of these is an error, told in one line: a kernel that was never launched, a
gap without an entry, an entry without a gap, a share below the required one.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from softgpu.profile import demangled
from softgpu.ptx import ask, of_library

SOFTGPU = Path(__file__).resolve().parents[2]


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

    @property
    def name(self) -> str:
        """As it is written in C++, short of the project's namespace."""
        return demangled(self.kernel).replace("unipool::", "")

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]


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


def load(files: Iterable[str | Path], containing: str = "") -> dict[Key, Coverage]:
    """All that the files' processes launched, of kernels whose mangled names contain a text."""
    lines = (line for file in files for line in Path(file).read_text().splitlines())
    return merge(line for line in lines if containing in json.loads(line)["kernel"])


def inventory(ptx: str) -> dict[Key, Coverage]:
    """Every kernel of a PTX text, with all of its instructions missed."""
    return merge(ask("softgpu_ptx_inventory", ptx.encode()).splitlines())


# --- the kernels of libraries


def of_libraries(folder: Path) -> dict[Key, Coverage]:
    """Every kernel of the libraries in a folder, with all of its instructions missed."""
    kernels: dict[Key, Coverage] = {}
    for library in sorted(folder.glob("*.so")):
        for _, text in of_library(library):
            kernels |= inventory(text)
    return kernels


def apply(measured: dict[Key, Coverage], kernels: dict[Key, Coverage]) -> list[Key]:
    """Takes over into `kernels` what was executed. Returns what is not among them."""
    same_code: dict[tuple, list[Coverage]] = defaultdict(list)
    for kernel in kernels.values():
        code = tuple(i.text for i in kernel.missed.values())
        same_code[kernel.kernel, code].append(kernel)
    for group in same_code.values():
        for run in [measured.get((k.architecture, k.kernel)) for k in group]:
            if run is None or run.total != group[0].total:
                continue
            for kernel in group:
                kernel.launches += run.launches
                kernel.missed = {n: i for n, i in kernel.missed.items() if n in run.missed}
    fits = {key for key, kernel in kernels.items() if key in measured}
    return sorted(
        key for key in measured if key not in fits or measured[key].total != kernels[key].total
    )


# --- gaps, and the list of those that must be


@cache
def _sources(folder: Path) -> dict[str, list[str]]:
    """Lines of the files in a folder, by the files' names."""
    files = (p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".h"))
    return {p.name: p.read_text().splitlines() for p in files}


def source_line(source: str | None, folder: Path) -> str:
    """ "file.cu:81" as "file.cu:81: text of the line"; files that are not in the folder (CUDA's
    own) have no text, nor has line 0, which is the compiler's."""
    name, _, number = (source or "?:0").rpartition(":")
    lines = _sources(folder).get(name, [])
    text = lines[int(number) - 1].strip() if 0 < int(number) <= len(lines) else ""
    return f"{name}:{number}: {text}".rstrip(": ")


@dataclass
class Gap:
    """Instructions of a kernel, one after the other, that were never executed."""

    kernel: Coverage
    instructions: list[Instruction]
    source: str  # of the first
    reason: str = ""


def gaps(kernel: Coverage, sources: Path) -> Iterator[Gap]:
    run: list[Instruction] = []
    for instruction in [*sorted(kernel.missed.values(), key=lambda i: i.index), None]:
        if run and (instruction is None or instruction.index != run[-1].index + 1):
            yield Gap(kernel, run, source_line(run[0].source, sources))
            run = []
        if instruction is not None:
            run.append(instruction)


@dataclass
class Exemption:
    """An entry of unexecuted.toml."""

    reason: str
    kernel: str = "*"
    source: str = "*"
    ptx: str = "*"
    used: bool = False

    def fits(self, gap: Gap) -> bool:
        return (
            fnmatchcase(gap.kernel.name, self.kernel)
            and fnmatchcase(gap.source, self.source)
            and fnmatchcase(gap.instructions[0].text, self.ptx)
        )

    def __str__(self) -> str:
        patterns = {"kernel": self.kernel, "source": self.source, "ptx": self.ptx}
        return ", ".join(f'{name} "{p}"' for name, p in patterns.items() if p != "*")


def read_exemptions(path: Path) -> list[Exemption]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return [Exemption(**entry) for entry in tomllib.loads(path.read_text()).get("unexecuted", [])]


def explain_gaps(all_gaps: list[Gap], exemptions: list[Exemption]) -> None:
    """Gives gaps the reason of the first entry that fits."""
    for gap in all_gaps:
        for exemption in exemptions:
            if exemption.fits(gap):
                exemption.used = True
                gap.reason = gap.reason or exemption.reason


# --- the report


def share(kernels: Iterable[Coverage]) -> float:
    """Executed instructions, percent."""
    kernels = list(kernels)
    return 100 * sum(k.executed for k in kernels) / max(1, sum(k.total for k in kernels))


def family_table(kernels: Iterable[Coverage]) -> str:
    """Per family: kernels that ran of all, then instructions executed of all, per architecture."""
    families: dict[str, dict[str, list[Coverage]]] = defaultdict(lambda: defaultdict(list))
    for kernel in kernels:
        for name in (kernel.family, "all"):
            families[name][kernel.architecture].append(kernel)
    architectures = sorted(families["all"])
    rows = [["family", *(f"{a}: {what}" for a in architectures for what in ("kernels", "code"))]]
    for name in sorted(families, key=lambda name: (name == "all", name)):
        row = [name]
        for architecture in architectures:
            mine = families[name][architecture]
            row.append(f"{sum(k.launches > 0 for k in mine)} of {len(mine)}")
            row.append(f"{share(mine):.2f}% of {sum(k.total for k in mine)}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def never_launched(all_gaps: list[Gap]) -> Iterator[str]:
    for gap in all_gaps:
        if not gap.kernel.launches:
            yield f"{gap.kernel.name} ({gap.kernel.architecture}) [{gap.reason or 'not listed'}]"


def never_executed(all_gaps: list[Gap], explain: bool = False) -> Iterator[str]:
    """A line for each source line with gaps, the largest first."""
    by_line: dict[tuple[str, str], list[Gap]] = defaultdict(list)
    for gap in all_gaps:
        if gap.kernel.launches:
            by_line[gap.source, gap.reason].append(gap)
    size = {key: sum(len(g.instructions) for g in mine) for key, mine in by_line.items()}
    for source, reason in sorted(by_line, key=lambda key: (-size[key], key)):
        mine = by_line[source, reason]
        families = ", ".join(sorted({g.kernel.family for g in mine}))
        count = len({(g.kernel.kernel, g.kernel.architecture) for g in mine})
        yield (
            f"{source}: {size[source, reason]} instructions in {count} of {families}"
            f" [{reason or 'not listed'}]"
        )
        for gap in mine if explain else ():
            yield f"    {gap.kernel.name} ({gap.kernel.architecture})"
            yield from (f"        {i.ptx_line}: {i.text}" for i in gap.instructions)


def errors(
    kernels: list[Coverage], all_gaps: list[Gap], exemptions: list[Exemption], required: float
) -> Iterator[str]:
    unlisted = [gap for gap in all_gaps if not gap.reason]
    yield from (f"never launched: {line}" for line in never_launched(unlisted))
    yield from (f"never executed: {line}" for line in never_executed(unlisted))
    for exemption in exemptions:
        if not exemption.used:
            yield f"listed, but executed after all or no code at all: {exemption}"
    for architecture in sorted({k.architecture for k in kernels}):
        reached = share(k for k in kernels if k.architecture == architecture)
        if reached < required:
            yield f"{architecture}: {reached:.2f}% of the instructions executed, not {required:g}%"


def main() -> None:
    parser = argparse.ArgumentParser(prog="softgpu.coverage", description="What kernels executed.")
    parser.add_argument("file", nargs="+", type=Path)
    parser.add_argument("--libraries", type=Path, required=True, help="folder with the op library")
    parser.add_argument("--named", default="", help="part of their kernels' mangled names")
    parser.add_argument("--require", type=float, metavar="PERCENT", help="of every architecture")
    parser.add_argument("--explain", action="store_true", help="every instruction of every gap")
    parser.add_argument("--sources", type=Path, default=SOFTGPU.parent / "csrc")
    parser.add_argument("--unexecuted", type=Path, default=SOFTGPU / "unexecuted.toml")
    options = parser.parse_args()

    kernels = of_libraries(options.libraries)
    if not kernels:
        sys.exit(f"coverage: no PTX in {options.libraries}/*.so")
    if foreign := apply(load(options.file, options.named), kernels):
        sys.exit(f"coverage: {foreign[0][1]} is not in these libraries: measured with others?")
    all_gaps = [gap for kernel in kernels.values() for gap in gaps(kernel, options.sources)]
    exemptions = read_exemptions(options.unexecuted)
    explain_gaps(all_gaps, exemptions)

    print(family_table(kernels.values()))
    print("\nNever launched:", *never_launched(all_gaps), sep="\n")
    print("\nNever executed:", *never_executed(all_gaps, options.explain), sep="\n")
    if options.require is not None:
        failures = list(errors([*kernels.values()], all_gaps, exemptions, options.require))
        sys.exit("\n".join(f"coverage: {line}" for line in failures) or 0)


if __name__ == "__main__":
    main()
