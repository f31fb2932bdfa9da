# SPDX-License-Identifier: Apache-2.0
"""What is known of every compiled kernel: ptxas's log, the object files, the table of tiles."""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import cubin

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?(\d+) bytes smem)?")
SERIALISED = "C7510"  # ptxas: wgmma instructions wait for each other
ELEMENT_BYTES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}
TILE = re.compile(rf"\bTile<({'|'.join(ELEMENT_BYTES)})((?:, \d+){{6}})\b")


@dataclass(frozen=True)
class Tile:
    """A row of kGemmTiles, and what a block of it takes."""

    name: str
    element_bytes: int
    m: int
    n: int
    k: int
    stages: int
    warps: tuple[int, int]
    pipeline_bytes: int
    launch_bytes: int  # of dynamic shared memory, at most
    chosen_on: tuple[int, ...]  # capabilities of the GPUs where it may be launched

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.element_bytes, self.m, self.n, self.k, self.stages, *self.warps)


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel for an architecture. None: not known without the object files."""

    name: str
    architecture: str  # sm_80, sm_90a
    registers: int
    shared_bytes: int = 0  # static
    stack_bytes: int = 0
    spill_bytes: int = 0  # stores and loads
    barriers: int = 0
    symbol: str = field(default="", compare=False)
    parameter_bytes: int | None = None
    max_threads: int | None = None  # of __launch_bounds__, as the next
    min_blocks: int | None = None

    @property
    def base_name(self) -> str:
        """Without the template's arguments."""
        return self.name.split("<", 1)[0]

    @property
    def capability(self) -> int:
        return int(re.sub(r"\D", "", self.architecture))

    @property
    def tile_shape(self) -> tuple[int, ...] | None:
        """Of the tile that is its template's argument, as Tile.shape has it."""
        match = TILE.search(self.name)
        if match is None:
            return None
        return (ELEMENT_BYTES[match.group(1)], *map(int, match.group(2).split(",")[1:]))


def parse(log: str) -> list[Kernel]:
    """ptxas -v prints an entry's name, then its stack and spills, then its registers."""
    found: list[dict] = []
    entry: dict = {}
    for line in log.splitlines():
        if match := ENTRY.search(line):
            entry = {"symbol": match.group(1), "architecture": match.group(2)}
        elif entry and (match := STACK.search(line)):
            stack, stores, loads = map(int, match.groups())
            entry |= {"stack_bytes": stack, "spill_bytes": stores + loads}
        elif entry and (match := USED.search(line)):
            registers, barriers, shared = (int(group or 0) for group in match.groups())
            entry |= {"registers": registers, "barriers": barriers, "shared_bytes": shared}
            found.append(entry)
            entry = {}
    names = demangle([entry["symbol"] for entry in found])
    return [Kernel(name=name, **entry) for name, entry in zip(names, found, strict=True)]


def demangle(symbols: list[str]) -> list[str]:
    command = ["c++filt", "-p"]
    run = subprocess.run(
        command, input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return [
        line.replace("(anonymous namespace)::", "").replace("unipool::", "").removeprefix("void ")
        for line in run.stdout.splitlines()
    ]


def with_object_files(kernels: list[Kernel], paths: list[Path]) -> list[Kernel]:
    """Adds what only the object files say. A kernel that none of them holds is an error."""
    resources: dict[tuple[str, int], cubin.Resources] = {}
    for path in paths:
        resources |= cubin.read(path)
    return [_with_resources(kernel, resources) for kernel in kernels]


def _with_resources(kernel: Kernel, resources: dict[tuple[str, int], cubin.Resources]) -> Kernel:
    found = resources.get((kernel.symbol, kernel.capability))
    if found is None:
        raise ValueError(f"{kernel.name} ({kernel.architecture}): in none of the object files")
    names = ("parameter_bytes", "max_threads", "min_blocks")
    return Kernel(**vars(kernel) | {name: getattr(found, name) for name in names})


def read_tiles(
    block_shared: dict[int, int], include: Path = ROOT / "csrc" / "include"
) -> list[Tile]:
    """The table in unipool/gemm_tiles.h, by a program that includes it. block_shared: for each
    capability the bytes of shared memory that a block may opt in to."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "gemm_tiles"))
        source = Path(__file__).with_name("gemm_tiles.cpp")
        subprocess.run(["c++", "-std=c++20", f"-I{include}", source, "-o", program], check=True)
        gpus = [f"{capability}:{size}" for capability, size in block_shared.items()]
        run = subprocess.run([program, *gpus], capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout)
    return [Tile(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in rows]
