# SPDX-License-Identifier: Apache-2.0
"""The op libraries for a machine with a GPU that compiles nothing: bench/gpu_check.sh --pack."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("libunipool_cpu.so", "libunipool_cuda.so")
LIMIT = 64 * 2**20  # bytes of the package and the repository together, to travel as one

# What a loaded package has to have: a kernel for the GPU behind every op that has one on the CPU.
LOADS = """
import json, torch, unipool
keys = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("unipool::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [n for n in keys if has(n, "CPU") and not has(n, "CUDA")]
print(json.dumps({"torch": torch.__version__, "ops": len(keys), "missing": missing}))
"""


def fail(why: str) -> None:
    sys.exit(f"gpu_check: {why}")


def build_command(package: Path) -> tuple[object, ...]:
    return (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-build-isolation", "--no-deps", "--target", package, ROOT)  # fmt: skip


def build_environment() -> dict[str, str]:
    """A build folder of its own: the one of this environment may be for another torch."""
    small = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_FLAGS=--compress-mode=size"
    folder = str(ROOT / "build" / "gpu_check")
    return {"UNIPOOL_CUDA": "ON", "UNIPOOL_BUILD_DIR": folder, "CMAKE_ARGS": small.strip()}


def library_folder(package: Path) -> Path:
    """Where build_command() puts the libraries."""
    return package / "unipool" / "lib"


def strip(source: Path, target: Path) -> None:
    run = subprocess.run(["strip", "--strip-unneeded", "-o", target, source])
    if run.returncode:
        fail(f"strip does not take {source}")


def repository_bytes() -> int:
    """Of the files that travel with the package."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, capture_output=True, text=True)
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def loaded(library_dir: Path) -> dict:
    """What a Python that takes its ops from this folder says of them."""
    environment = {**os.environ, "UNIPOOL_LIBRARY_DIR": str(library_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOADS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        fail(f"the libraries do not load: {lines[-1] if lines else 'no reason given'}")
    return json.loads(run.stdout.splitlines()[-1])


def built() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    command = list(map(str, build_command(Path(folder.name))))
    if subprocess.run(command, env={**os.environ, **build_environment()}).returncode:
        fail("the ops do not compile")
    return folder


def pack(target: Path, libraries: Path | None = None) -> None:
    """Puts stripped libraries into target/lib, from a folder or from a build of this environment,
    and checks that they fit and load. target/package.json says for which torch they are."""
    if libraries is None:
        with built() as folder:
            pack(target, library_folder(Path(folder)))
        return
    shutil.rmtree(target / "lib", ignore_errors=True)
    (target / "lib").mkdir(parents=True)
    for name in LIBRARIES:
        if not (libraries / name).is_file():
            fail(f"{libraries / name} is missing")
        strip(libraries / name, target / "lib" / name)
    size = sum((target / "lib" / name).stat().st_size for name in LIBRARIES)
    total = size + repository_bytes()
    if total > LIMIT:
        fail(
            f"the package ({size / 2**20:.1f} MiB) and the repository are {total / 2**20:.1f} MiB, "
            f"more than {LIMIT / 2**20:.0f}: compile with nvcc --compress-mode=size"
        )
    found = loaded(target / "lib")
    if found["missing"]:
        fail(f"no CUDA kernel for {', '.join(found['missing'])}")
    about = {"torch": found["torch"], "ops": found["ops"], "bytes": size}
    (target / "package.json").write_text(json.dumps(about, indent=1) + "\n")
    print(
        f"{target}: {len(LIBRARIES)} libraries for torch {found['torch']}, {found['ops']} ops, "
        f"{size / 2**20:.1f} MiB; {total / 2**20:.1f} MiB with the repository"
    )
