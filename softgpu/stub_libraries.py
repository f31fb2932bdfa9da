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


def read(tool: str, option: str, library: Path) -> str:
    return subprocess.run([tool, option, library], capture_output=True, text=True).stdout


def function(name: str) -> str:
    """Says that its library is of version 0, where torch asks before it chooses; else it stops."""
    does = "return 0" if name.endswith("Version") else "__builtin_trap()"
    return f"int {name}(void) {{ {does}; }}"


def build(torch: Path, folder: Path) -> list[Path]:
    """Makes them for the torch in a folder (.../site-packages/torch) and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    ready, made_of = folder / "ready", f"{torch} {Path(__file__).stat().st_mtime_ns}"
    if ready.exists() and ready.read_text() == made_of:
        return sorted(folder.glob("*.so*"))
    for old in folder.glob("*"):
        old.unlink()
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
        body = "\n".join(map(function, sorted(symbols)))
        source.write_text(body + "\n")
        script = folder / "stub.map"
        script.write_text(f"{version.get(name)} {{ global: *; }};\n")
        flags = ["-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        if name in version:
            flags.append(f"-Wl,--version-script={script}")
        subprocess.run(["gcc", *flags, source, "-o", folder / name], check=True)
    ready.write_text(made_of)
    return sorted(folder.glob("*.so*"))
