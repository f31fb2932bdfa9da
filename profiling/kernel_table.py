# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory, stack and spills of every kernel, from the output of a build.

    python profiling/kernel_table.py BUILD_LOG [--json FILE] [--max-spill BYTES] [--all]

Fails if a kernel spills more than the bound, or if ptxas had to serialise wgmma (C7510). Without
--all, kernels that differ in template arguments only are one line, with the greatest figures.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SERIALISED = "C7510"


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    shared_bytes: int  # static
    stack_bytes: int
    spill_bytes: int  # stores and loads


def parse(log: str) -> list[Kernel]:
    """ptxas -v prints an entry's name, then its stack and spills, then its registers."""
    found: list[Kernel] = []
    name = architecture = ""
    stack = spills = 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            name, architecture = match.groups()
            stack = spills = 0
        elif match := STACK.search(line):
            stack, stores, loads = map(int, match.groups())
            spills = stores + loads
        elif name and (match := USED.search(line)):
            shared = int(match.group(2) or 0)
            found.append(Kernel(name, architecture, int(match.group(1)), shared, stack, spills))
            name = ""
    return [replace(k, name=n) for k, n in zip(found, demangle(found), strict=True)]


def demangle(kernels: list[Kernel]) -> list[str]:
    names = "\n".join(k.name for k in kernels)
    run = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True, check=True)
    return [
        line.replace("(anonymous namespace)::", "").removeprefix("void ").removeprefix("unipool::")
        for line in run.stdout.splitlines()
    ]


def merge(kernels: list[Kernel]) -> list[tuple[Kernel, int]]:
    """One row for a kernel template on an architecture, with the greatest figures of its kind."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for k in kernels:
        groups.setdefault((k.name.split("<", 1)[0], k.architecture), []).append(k)
    figures = ("registers", "shared_bytes", "stack_bytes", "spill_bytes")
    return [
        (Kernel(*key, *(max(getattr(k, f) for k in group) for f in figures)), len(group))
        for key, group in groups.items()
    ]


def print_table(rows: list[tuple[Kernel, int]]) -> None:
    width = max(len(k.name) for k, _ in rows)
    print(f"{'kernel':<{width}}  {'arch':<7} {'kinds':>5} {'regs':>4} {'smem':>6} stack spills")
    for k, count in sorted(rows, key=lambda row: (row[0].name, row[0].architecture)):
        print(
            f"{k.name:<{width}}  {k.architecture:<7} {count:>5} {k.registers:>4} "
            f"{k.shared_bytes:>6} {k.stack_bytes:>5} {k.spill_bytes:>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="what the build printed, with ptxas -v")
    parser.add_argument("--json", type=Path, help="write the table of all kernels to this file")
    parser.add_argument("--max-spill", type=int, default=0, help="bytes that a kernel may spill")
    parser.add_argument("--all", action="store_true", help="a line for every instance")
    arguments = parser.parse_args()
    log = arguments.log.read_text()
    kernels = parse(log)
    if not kernels:
        sys.exit(f"{arguments.log}: no kernels found; was it built with -Xptxas=-v?")
    print_table([(k, 1) for k in kernels] if arguments.all else merge(kernels))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    failed = [k for k in kernels if k.spill_bytes > arguments.max_spill]
    for k in failed:
        print(f"{k.name} ({k.architecture}) spills {k.spill_bytes} bytes", file=sys.stderr)
    if SERIALISED in log:
        print(f"ptxas {SERIALISED}: wgmma was serialised", file=sys.stderr)
    sys.exit(bool(failed) or SERIALISED in log)


if __name__ == "__main__":
    main()
