# SPDX-License-Identifier: Apache-2.0
"""A table of every kernel, and a check of what would fail at its launch, from a build's output.

    python profiling/kernel_table.py BUILD_LOG [--objects FILE ...] [--json FILE] [--all]

The log is what ptxas -v printed; the object files (nvcc --compress-mode=none) add parameters and
launch bounds. What breaks a rule of kernel_rules.py is one line each and exit status 1, as is a
wgmma that ptxas had to serialise (C7510). Without --all, kernels that differ in template arguments
only are one line, with the greatest figures.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import kernel_rules
from kernel_facts import SERIALISED, Kernel, Tile, parse, read_tiles, with_object_files

COLUMNS = {
    "regs": "registers",
    "threads": "max_threads",
    "smem": "shared_bytes",
    "params": "parameter_bytes",
    "stack": "stack_bytes",
    "spills": "spill_bytes",
    "bars": "barriers",
}


def merge(kernels: list[Kernel]) -> list[tuple[Kernel, int]]:
    """One row for a kernel template on an architecture, with the greatest figures of its kind."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.base_name, kernel.architecture), []).append(kernel)
    return [(_greatest(name, group), len(group)) for (name, _), group in groups.items()]


def _greatest(name: str, group: list[Kernel]) -> Kernel:
    figures = {f: [getattr(k, f) for k in group] for f in COLUMNS.values()}
    known = {f: max(values) for f, values in figures.items() if None not in values}
    return replace(group[0], name=name, **known)


def print_table(rows: list[tuple[Kernel, int]]) -> None:
    width = max(len(kernel.name) for kernel, _ in rows)
    heads = " ".join(f"{head:>7}" for head in COLUMNS)
    print(f"{'kernel':<{width}}  {'arch':<7} {'kinds':>5} {heads}")
    for kernel, count in sorted(rows, key=lambda row: (row[0].name, row[0].architecture)):
        values = (getattr(kernel, field) for field in COLUMNS.values())
        figures = " ".join(f"{'-' if value is None else value:>7}" for value in values)
        print(f"{kernel.name:<{width}}  {kernel.architecture:<7} {count:>5} {figures}")


def print_tiles(tiles: list[Tile]) -> None:
    print("\ntile  pipeline  at most (bytes)  may be launched on")
    for tile in tiles:
        gpus = ", ".join(f"sm_{capability}" for capability in tile.chosen_on)
        print(f"{tile.name:<5} {tile.pipeline_bytes:>8,} {tile.launch_bytes:>8,}          {gpus}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="what the build printed, with ptxas -v")
    parser.add_argument("--objects", type=Path, nargs="+", default=[], help="the object files")
    parser.add_argument("--json", type=Path, help="write the table of all kernels to this file")
    parser.add_argument("--max-spill", type=int, default=0, help="bytes of stack, and of spills")
    parser.add_argument("--all", action="store_true", help="a line for every instance")
    arguments = parser.parse_args()
    log = arguments.log.read_text()
    kernels = parse(log)
    if not kernels:
        sys.exit(f"{arguments.log}: no kernels found; was it built with -Xptxas=-v?")
    tiles = read_tiles(kernel_rules.BLOCK_SHARED)
    if arguments.objects:
        try:
            kernels = with_object_files(kernels, arguments.objects)
        except ValueError as error:
            sys.exit(f"kernel_table: {error}")
    print_table([(k, 1) for k in kernels] if arguments.all else merge(kernels))
    print_tiles(tiles)
    print(flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    failed = kernel_rules.check(kernels, tiles, arguments.max_spill)
    if SERIALISED in log:
        failed.append(f"ptxas {SERIALISED}: wgmma was serialised")
    for line in failed:
        print(line, file=sys.stderr)
    print(f"{len(kernels)} instances checked, {len(failed)} findings")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
