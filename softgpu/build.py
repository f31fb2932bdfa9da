# SPDX-License-Identifier: Apache-2.0
"""Turns an environment with a CUDA torch into one with software GPUs.

    VENV/bin/python softgpu/build.py

The torch must have come without NVIDIA's packages (pip install --no-deps torch): empty stand-ins
for them, the runtime and torch's operations on it are put where torch looks for NVIDIA's. From then
on every program of this environment finds a GPU. What did not change is not built again.
"""

import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import stub_libraries

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "softgpu"
CXX = "g++"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra"]
# No contraction: PTX says which products are fused. -fnon-call-exceptions: a fault is an Error.
PTX_FLAGS = [
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-ffp-contract=off",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fnon-call-exceptions",
]


def fail(why: str) -> None:
    sys.exit(f"softgpu: {why}")


def torch_folder() -> Path:
    """Of the torch in this environment, found without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        fail(f"{sys.executable} has no torch")
    folder = Path(spec.origin).parent
    if not (folder / "lib" / "libtorch_cuda.so").exists():
        fail(f"the torch of {sys.executable} has no CUDA")
    if (folder.parent / "nvidia").exists():
        fail("this torch has NVIDIA's libraries: it must come from pip install --no-deps torch")
    return folder


def cuda_include() -> Path:
    """Headers of the toolkit that nvcc belongs to."""
    try:
        run = subprocess.run(
            ["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
        )
    except FileNotFoundError:
        fail("nvcc not found")
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    include = Path(top.group(1).strip(), "include") if top else Path()
    if not (include / "cuda_runtime_api.h").is_file():
        fail("nvcc does not say where its headers are")
    return include


def newer(target: Path, sources: list[Path]) -> bool:
    return target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in sources)


def run(command: list[object], what: str) -> None:
    if subprocess.run(list(map(str, command))).returncode:
        fail(f"{what} does not compile")


def compile_objects(sources: list[Path], flags: list[object]) -> list[Path]:
    headers = [*HERE.glob("*/*.h"), Path(__file__)]

    def one(source: Path) -> Path:
        target = BUILD / "objects" / f"{source.parent.name}-{source.stem}.o"
        if not newer(target, [source, *headers]):
            target.parent.mkdir(parents=True, exist_ok=True)
            print(f"softgpu: compiling {source.name}", flush=True)
            run([CXX, *FLAGS, *flags, "-c", source, "-o", target], source.name)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def link(name: str, objects: list[Path], *flags: object) -> Path:
    target = BUILD / name
    if not newer(target, objects):
        run([CXX, "-shared", *objects, *flags, "-o", target], name)
    return target


def header(include: Path, name: str) -> str:
    return (include / name).read_text(encoding="utf-8")


def write_if_changed(target: Path, text: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return target


def missing_functions(include: Path) -> Path:
    """Every function of the runtime that is not written, as an error that says its name."""
    declared = re.findall(r"\b(cuda[A-Z]\w+)\(", header(include, "cuda_runtime_api.h"))
    written = "".join(p.read_text() for p in (HERE / "runtime").glob("*.cpp"))
    lines = ['extern "C" int softgpu_not_provided(const char*);']
    for name in sorted(set(declared) - set(re.findall(r"\b(cuda[A-Z]\w+)\(", written))):
        lines.append(f'extern "C" int {name}() {{ return softgpu_not_provided("{name}"); }}')
    return write_if_changed(BUILD / "generated" / "missing.cpp", "\n".join(lines) + "\n")


def error_names(include: Path) -> None:
    """The names of all errors, for cudaGetErrorName."""
    declared = re.search(
        r"enum .*?cudaError\s*\{(.*?)\n\};", header(include, "driver_types.h"), re.S
    )
    names = re.findall(r"^\s*(cudaError\w+|cudaSuccess)\s*=", declared[1], re.MULTILINE)
    write_if_changed(BUILD / "generated" / "errors.inc", "".join(f"NAME({n})\n" for n in names))


def build_runtime(include: Path) -> list[Path]:
    flags = ["-isystem", include, f"-I{HERE}", f"-I{BUILD / 'generated'}"]
    error_names(include)
    driver = HERE / "runtime" / "driver.cpp"
    sources = [p for p in sorted((HERE / "runtime").glob("*.cpp")) if p != driver]
    objects = compile_objects([*sources, missing_functions(include)], flags)
    objects += compile_objects(sorted((HERE / "ptx").glob("*.cpp")), [*flags, *PTX_FLAGS])
    script = BUILD / "generated" / "exports.map"
    script.write_text("libcudart.so.13 { global: cuda*; __cuda*; softgpu_*; local: *; };\n")
    return [
        link(
            "libcudart.so.13",
            objects,
            "-Wl,-soname,libcudart.so.13",
            f"-Wl,--version-script={script}",
        ),
        link("libcuda.so.1", compile_objects([driver], []), "-Wl,-soname,libcuda.so.1"),
    ]


def build_torch_operations(torch: Path, include: Path, abi: int) -> Path:
    flags = [f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    for folder in (torch / "include", torch / "include/torch/csrc/api/include", include):
        flags += ["-isystem", folder]
    objects = compile_objects([HERE / "torch" / "aten.cpp"], flags)
    libraries = ["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10", "-l:libcudart.so.13"]
    return link("libsoftgpu_torch.so", objects, f"-L{torch / 'lib'}", f"-L{BUILD}", *libraries)


def install(libraries: list[Path], torch: Path) -> None:
    """Links beside torch's own libraries, and a path file: nothing is copied."""
    for library in libraries:
        place = torch / "lib" / library.name
        place.unlink(missing_ok=True)
        place.symlink_to(library)
    packages = Path(sysconfig.get_path("purelib"))
    paths = packages / "softgpu.pth"
    paths.unlink(missing_ok=True)
    paths.write_text(f"{HERE / 'python'}\n")


def main() -> None:
    torch, include = torch_folder(), cuda_include()
    libraries = build_runtime(include)
    stubs = stub_libraries.build(torch, BUILD / "stubs")
    install([*libraries, *stubs], torch)
    abi = subprocess.run(
        [sys.executable, "-c", "import torch; print(int(torch.compiled_with_cxx11_abi()))"],
        env={"SOFTGPU": "runtime-only"},
        capture_output=True,
        text=True,
    )
    if abi.returncode:
        fail(f"torch does not import: {abi.stderr.strip().splitlines()[-1]}")
    build_torch_operations(torch, include, int(abi.stdout))


if __name__ == "__main__":
    main()
