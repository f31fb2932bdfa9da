# SPDX-License-Identifier: Apache-2.0
"""What the kernels executed, and what their memory accesses cost.

    SOFTGPU_PROFILE=FILE python program.py
    python -m softgpu.profile FILE [--json] [--top N]

A process with SOFTGPU_PROFILE=FILE appends to FILE, when it ends, one line of JSON for each kernel
that it launched; lines of one kernel add up. The same work gives the same counts, on any machine.

`issued` are instructions of warps, `lanes` the lanes that executed them (a false guard is issued
and has none), `instructions` the issued ones by class. A request is one access of a warp to one
space. Global: `sectors` of 32 bytes that a request touches. Shared: `wavefronts` by 32 banks of 4
bytes, each of which gives one word in a wavefront, to all lanes that ask for it; accesses of 8
bytes are done by half a warp at a time, of 16 bytes and ldmatrix by a quarter. `ideal` is the least
that the bytes (sectors) or the width (wavefronts) need, `bytes` the different ones that the lanes
asked for. cp.async counts as a global load and a shared store. Constants, parameters and local
memory are counted as instructions only. No caches: sectors are what the first level is asked for.
"""

import argparse
import ctypes
import json
from collections.abc import Iterable
from pathlib import Path

GLOBAL = ("global_load", "global_store", "global_atomic")
SHARED = ("shared_load", "shared_store", "shared_atomic")
Profile = dict[tuple[str, str], dict]  # by architecture and kernel


def _add(into: dict, row: dict) -> None:
    for key, value in row.items():
        if isinstance(value, dict):
            _add(into.setdefault(key, {}), value)
        elif isinstance(value, int):
            into[key] = into.get(key, 0) + value
        else:
            into[key] = value


def load(files: Iterable[str | Path]) -> Profile:
    """The kernels of all processes that wrote to the files, most instructions first."""
    merged: Profile = {}
    for file in files:
        for line in Path(file).read_text().splitlines():
            row = json.loads(line)
            _add(merged.setdefault((row["architecture"], row["kernel"]), {}), row)
    return dict(sorted(merged.items(), key=lambda kv: (-kv[1]["issued"], kv[0])))


def demangled(name: str) -> str:
    """A C++ name as it is written, without its parameters; others as they are."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value or not text:
        return name
    plain = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    plain = plain.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for at, c in enumerate(plain):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return plain[:at]
    return plain


def _ratio(part: float, whole: float, digits: int = 1) -> str:
    return f"{part / whole:.{digits}f}" if whole else "-"


def _row(kernel: dict) -> list[str]:
    loads, stores = kernel["global_load"], kernel["global_store"]
    wavefronts = sum(kernel[s]["wavefronts"] for s in SHARED)
    ideal = sum(kernel[s]["ideal"] for s in SHARED)
    classes = sorted(kernel["instructions"].items(), key=lambda kv: (-kv[1], kv[0]))
    share = [f"{name} {100 * n / kernel['issued']:.0f}%" for name, n in classes[:4]]
    return [
        str(kernel["launches"]),
        str(kernel["issued"]),
        _ratio(100 * kernel["lanes"], 32 * kernel["issued"], 0) + "%",
        f"{kernel['tensor_flops'] / 1e6:.1f}",
        _ratio(loads["sectors"], loads["requests"]),
        _ratio(100 * loads["bytes"], 32 * loads["sectors"], 0),
        _ratio(stores["sectors"], stores["requests"]),
        _ratio(100 * stores["bytes"], 32 * stores["sectors"], 0),
        str(wavefronts - ideal),
        _ratio(wavefronts, ideal, 2),
        str(sum(kernel[s]["requests"] for s in ("global_atomic", "shared_atomic"))),
        ", ".join(share),
        f"{demangled(kernel['kernel'])} ({kernel['architecture']})",
    ]


HEADER = [
    "launches",
    "warp instructions",
    "lanes",
    "tensor MFLOP",
    "sectors per load",
    "% used",
    "sectors per store",
    "% used",
    "bank conflicts",
    "wavefronts per ideal",
    "atomic requests",
    "classes",
    "kernel",
]


def table(profile: Profile, top: int | None = None) -> str:
    rows = [HEADER, *(_row(kernel) for kernel in list(profile.values())[:top])]
    widths = [max(len(row[c]) for row in rows) for c in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column >= len(HEADER) - 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="softgpu.profile", description="What kernels executed.")
    parser.add_argument("file", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="one object per kernel, added up")
    parser.add_argument("--top", type=int, help="kernels with the most instructions")
    options = parser.parse_args()
    profile = load(options.file)
    if options.json:
        print(json.dumps(list(profile.values())[: options.top], indent=1))
    else:
        print(table(profile, options.top))


if __name__ == "__main__":
    main()
