# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources with g++ against the emulator, and the ops of UniPool with them.

    python emulation/build.py [fast|check|asan ...]      # libunipool_emulated_<flavour>.so

Objects and libraries are kept under build/emulation by a hash of the compiler, the flags, the
source and every header of the project, so an unchanged file is never compiled twice.

Flavours: `fast` (-O2), `check` (races, bounds, misaligned and unwritten memory: emu_race.cpp), and
`asan` (AddressSanitizer and UBSan; needs LD_PRELOAD, see `preload`).
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CSRC = ROOT / "csrc"
OUT = Path(os.environ.get("UNIPOOL_EMULATION_DIR", ROOT / "build" / "emulation"))
CXX = os.environ.get("CXX", "g++")
JOBS = int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 4)))
FLAVOURS = ("fast", "check", "asan")

RUNTIME = ["emu_rt.cpp", "emu_collectives.cpp", "emu_memory.cpp", "emu_sm90.cpp"]
KERNELS = ["cuda/router.cu", "cuda/dispatch.cu"]
CUTE_KERNELS = [
    "cuda/grouped_mm.cu",
    "cuda/wgrad.cu",
    "cuda/expert_mlp.cu",
    "cuda/expert_mlp_bwd.cu",
]
GLUE = ["ops/schema.cpp", "ops/checks.cpp"]
GLUE_CUDA = [
    "cuda/router_op.cpp",
    "cuda/router_logits_op.cpp",
    "cuda/dispatch_op.cpp",
    "cuda/experts_op.cpp",
]

SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
RUNTIME_FLAGS = {"fast": ["-O3"], "check": ["-O3", "-DEMU_RACE"], "asan": ["-O1", *SANITIZE]}
KERNEL_FLAGS = {"fast": ["-O2"], "check": ["-O1", "-fsanitize=thread"], "asan": ["-O1", *SANITIZE]}
# Lines but no types in the debug information, of which CuTe has too many: half the time and memory.
CUTE_FLAGS = ["-O1", "-g1"]
COMMON = ["-fPIC", "-Wall", "-fno-gnu-unique", "-g"]
# CuTe asks for the toolkit's version and calls the driver directly only when told so.
SM90 = [
    "-D__CUDACC_VER_MAJOR__=13",
    "-D__CUDACC_VER_MINOR__=0",
    "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1",
]


class BuildError(RuntimeError):
    """A tool or a header is missing, or a source does not compile; one line says which."""


@dataclass(frozen=True)
class Source:
    """A file and its flags; `text` replaces what is on disk (a planted fault)."""

    path: Path
    flags: tuple[str, ...]
    text: str | None = None


# --- where things are


@cache
def cuda_home() -> Path:
    """Toolkit root: CUDA_HOME, what nvcc says, or /usr/local/cuda. Only its headers are used."""
    candidates = [os.environ.get("CUDA_HOME"), _nvcc_root(), "/usr/local/cuda"]
    for root in filter(None, candidates):
        if (Path(root) / "include" / "cuda_runtime.h").is_file():
            return Path(root)
    raise BuildError("emulation: no CUDA headers found; set CUDA_HOME to a toolkit's root")


def _nvcc_root() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    return top.group(1).strip() if top else None


@cache
def cutlass_include() -> Path:
    """CUTLASS_DIR, or the nvidia-cutlass package (found without importing it)."""
    given = os.environ.get("CUTLASS_DIR")
    roots = [Path(given), Path(given) / "include"] if given else []
    roots += [Path(p) / "cutlass_library" / "source" / "include" for p in sys.path]
    for root in roots:
        if (root / "cute" / "tensor.hpp").is_file():
            return root
    raise BuildError("emulation: no CUTLASS headers; set CUTLASS_DIR or install nvidia-cutlass")


@cache
def compiler() -> str:
    path = shutil.which(CXX)
    if path is None:
        raise BuildError(f"emulation: {CXX} not found")
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0]


def preload() -> str:
    """What LD_PRELOAD must hold for a Python process that loads an asan library."""

    def library(name: str) -> str:
        command = [CXX, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return f"{library('libasan.so')}:{library('libubsan.so')}"


# --- sources


def _cuda_includes() -> list[str]:
    include = cuda_home() / "include"
    return ["-isystem", str(include), "-isystem", str(include / "cccl")]


def runtime_sources(flavour: str) -> list[Source]:
    names = [*RUNTIME, "emu_race.cpp"] if flavour == "check" else RUNTIME
    flags = ("-std=c++17", "-Wextra", *RUNTIME_FLAGS[flavour], *_cuda_includes())
    return [Source(HERE / name, flags) for name in names]


def kernel_source(
    path: Path, flavour: str, *, text: str | None = None, cute: bool = False, extra: Sequence = ()
) -> Source:
    """A .cu file as the emulator sees it."""
    flags = ["-std=c++17", "-x", "c++", "-include", str(HERE / "emu.h"), f"-I{HERE}", f"-I{CSRC}"]
    flags += [f"-I{CSRC / 'include'}", f"-I{path.parent}", "-fno-strict-aliasing"]
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-unused-local-typedefs"]
    if cute:
        flags += [f"-I{HERE / 'include'}", "-isystem", str(cutlass_include()), *SM90]
    flags += [*_cuda_includes(), *KERNEL_FLAGS[flavour], *(CUTE_FLAGS if cute else []), *extra]
    return Source(path, tuple(flags), text)


def kernel_sources(flavour: str) -> list[Source]:
    """All kernels of the project."""
    names = [*KERNELS, *CUTE_KERNELS]
    return [kernel_source(CSRC / n, flavour, cute=n in CUTE_KERNELS) for n in names]


def op_sources(flavour: str) -> list[Source]:
    """Schema, checks and glue of the ops, registered for CPU tensors as unipool_emulated."""
    flags = ["-std=c++20", "-O1", "-DUNIPOOL_EMULATED", "-DUNIPOOL_NAMESPACE=unipool_emulated"]
    flags += [f"-I{CSRC}", f"-I{CSRC / 'include'}", *_cuda_includes()]
    torch_dir, abi = _torch()
    for include in ("include", "include/torch/csrc/api/include"):
        flags += ["-isystem", f"{torch_dir}/{include}"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={abi}")
    glue = [Source(CSRC / name, tuple(flags)) for name in (*GLUE, *GLUE_CUDA)]
    return glue + kernel_sources(flavour)


@cache
def _torch() -> tuple[str, int]:
    import torch

    return os.path.dirname(torch.__file__), int(torch.compiled_with_cxx11_abi())


# --- compiling


_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def _headers(text: str, folder: Path, seen: dict[Path, str]) -> None:
    """Adds the project's headers that a text includes, and those that they include."""
    for name in _INCLUDE.findall(text):
        for root in (folder, HERE, CSRC, CSRC / "include"):
            path = (root / name).resolve()
            if path.is_file():
                if path not in seen:
                    seen[path] = path.read_text()
                    _headers(seen[path], path.parent, seen)
                break


def _dependencies(source: Source, text: str) -> str:
    seen: dict[Path, str] = {}
    _headers(text + '\n#include "emu.h"', source.path.parent, seen)
    if f"-I{HERE / 'include'}" in source.flags:
        for path in (HERE / "include").rglob("*.hpp"):
            seen[path] = path.read_text()
            _headers(seen[path], path.parent, seen)
    return "\0".join(seen[path] for path in sorted(seen))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((compiler(), *parts)).encode()).hexdigest()[:24]


def _compile(source: Source) -> Path:
    text = source.path.read_text() if source.text is None else source.text
    key = _key(_dependencies(source, text), *source.flags, text)
    target = OUT / f"{source.path.stem}-{key}.o"
    if target.exists():
        return target
    OUT.mkdir(parents=True, exist_ok=True)
    path = source.path
    if source.text is not None:
        path = target.with_suffix(source.path.suffix)
        path.write_text(text)
    partial = target.with_suffix(f".{os.getpid()}")
    _run([CXX, *COMMON, *source.flags, "-c", str(path), "-o", str(partial)], source.path.name)
    partial.replace(target)
    return target


def _run(command: list[str], what: str) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if "error" in line]
        raise BuildError(f"emulation: {what}: {lines[0] if lines else run.stderr.strip()}")


def library(name: str, sources: Sequence[Source], flavour: str, link: Sequence[str] = ()) -> Path:
    """Compiles what changed, and links lib<name>_<flavour>; returns its path."""
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(_compile, [*sources, *runtime_sources(flavour)]))
    key = _key(*(str(o) for o in objects), *link)
    target = OUT / f"lib{name}_{flavour}-{key}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        sanitize = SANITIZE if flavour == "asan" else []  # never -fsanitize=thread: we are libtsan
        command = [CXX, "-shared", "-Wl,-Bsymbolic", *sanitize, *map(str, objects), *link, "-ldl"]
        _run([*command, "-o", str(partial)], target.name)
        partial.replace(target)
    return target


def ops_library(flavour: str = "fast") -> Path:
    """torch.ops.unipool_emulated: load it with torch.ops.load_library."""
    lib = f"{_torch()[0]}/lib"
    link = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    return library("unipool_emulated", op_sources(flavour), flavour, link)


def main(arguments: Sequence[str]) -> None:
    unknown = [a for a in arguments if a not in FLAVOURS]
    if unknown:
        raise SystemExit(f"emulation: flavour must be one of {FLAVOURS}, got {unknown[0]}")
    for flavour in arguments or ("fast", "check"):
        print(ops_library(flavour))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BuildError as error:
        raise SystemExit(str(error)) from None
