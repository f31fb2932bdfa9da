# SPDX-License-Identifier: Apache-2.0
"""Empty stand-ins for NVIDIA's libraries (cuBLAS, cuDNN, NCCL, ...), so that a CUDA torch loads
where only the torch wheel is installed (pip install --no-deps torch: 1.2 GB instead of 4.8).
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

OURS = re.compile(r"libcudart\.|libcuda\.|libtorch|libc10|libshm|libcaffe2|libgomp")
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|util)\.so|ld-linux")

CUPTI_ERROR_NOT_INITIALIZED = 15

# What the other functions do.
CALLED = """#include <stdio.h>
#include <stdlib.h>
static int stub(const char* name) {{
  fprintf(stderr, "softgpu: %s was called, but {library} is empty here\\n", name);
  abort();
}}"""


def read(tool: str, option: str, library: Path) -> str:
    return subprocess.run([tool, option, library], capture_output=True, text=True).stdout


def function(name: str, known: dict[str, int]) -> str:
    """In C: stops the program, unless torch calls it without needing its work."""
    if name == "cuptiGetResultString":
        return f'int {name}(int error, const char** text) {{ *text = "no CUPTI"; return 0; }}'
    if name.startswith("cupti"):  # no profile of kernels; torch's own events remain
        return f"int {name}(void) {{ return {CUPTI_ERROR_NOT_INITIALIZED}; }}"
    if name in known:
        return f"long {name}(void) {{ return {known[name]}; }}"
    return f'int {name}(void) {{ return stub("{name}"); }}'


def versions(torch: Path) -> dict[str, int]:
    """cuDNN's version, by which torch decides in which order it tries its kinds of attention."""
    metadata = next(torch.parent.glob("torch-*.dist-info")) / "METADATA"
    cudnn = re.search(r"nvidia-cudnn-cu\d+==(\d+)\.(\d+)\.(\d+)", metadata.read_text())
    if not cudnn:
        return {}
    major, minor, patch = map(int, cudnn.groups())
    return {"cudnnGetVersion": 10000 * major + 100 * minor + patch}


def build(torch: Path, folder: Path) -> list[Path]:
    """Makes them for the torch in a folder (.../site-packages/torch) and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    ready, made_for = folder / "ready", f"{torch}\n{Path(__file__).read_text()}"
    if ready.exists() and ready.read_text() == made_for:
        return sorted(folder.glob("*.so*"))
    for old in folder.glob("*"):
        old.unlink()
    known = versions(torch)
    needed: set[str] = set()
    version: dict[str, str] = {}  # of a library's symbols
    versioned: dict[str, set[str]] = defaultdict(set)  # version -> symbols
    plain: set[str] = set()
    defined: set[str] = set()
    libraries = sorted(p for p in (torch / "lib").glob("*.so*") if not p.is_symlink())
    for library in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", read("readelf", "-dW", library)))
        for file, names in re.findall(
            r"File: (\S+)  Cnt.*\n((?:.*Name: .*\n)+)", read("readelf", "-VW", library)
        ):
            version[file] = re.findall(r"Name: (\S+)", names)[0]
        defined |= set(re.findall(r" [TWBDVRu] ([^@\s]+)", read("nm", "-D", library)))
        for name, needs in re.findall(r" U (\S+?)(?:@(\S+))?$", read("nm", "-D", library), re.M):
            (versioned[needs] if needs else plain).add(name)
    wanted = [n for n in sorted(needed) if not OURS.match(n) and not SYSTEM.match(n)]
    # Names without a version: into one of the libraries, as the loader does not ask which.
    prefix = re.compile(
        r"p?nccl|cudnn|cusparseLt|nvshmem|nvrtc|nvJit|cupti|cuFile|cublas|cufft|curand"
    )
    loose = {n for n in plain - defined if prefix.match(n)}
    for name in wanted:
        symbols = versioned.get(version.get(name, ""), set())
        if name == wanted[0]:
            symbols = symbols | loose
        source = folder / "stub.c"
        body = [function(symbol, known) for symbol in sorted(symbols)]
        source.write_text("\n".join([CALLED.format(library=name), *body]) + "\n")
        script = folder / "stub.map"
        script.write_text(f"{version.get(name)} {{ global: *; }};\n")
        flags = ["-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        if name in version:
            flags.append(f"-Wl,--version-script={script}")
        subprocess.run(["gcc", *flags, source, "-o", folder / name], check=True)
    ready.write_text(made_for)
    return sorted(folder.glob("*.so*"))
