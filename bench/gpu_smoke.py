# SPDX-License-Identifier: Apache-2.0
"""Every op once, forward and backward, on small odd shapes of a GPU, compared with the CPU.

    python bench/gpu_smoke.py [--few] [--profile] [--json FILE]

What a sanitizer is to watch; --few takes fewer cases of the expert ops, whose kernels a sanitizer
slows down most. --profile collects the names of the kernels that ran, and fails if a kernel of
csrc/cuda is not among them: a clean report of a sanitizer would then say nothing about it.
"""

import argparse
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from compare_backends import (
    BF16,
    CPU,
    CUDA,
    F16,
    F32,
    ROOT,
    Difference,
    cases,
    differences,
    results_on,
)
from harness import require_device, write_json

NAMES = ("one_token", "ties", "ragged", "M_not_pow2", "dropped", "k_is_M", "pool_384", "pool_1024")
EXPERT_NAMES = ("one_token", "ragged", "M_not_pow2", "dropped", "all_to_one_expert", "k_is_M")
FEW_EXPERT_NAMES = ("M_not_pow2", "dropped")


def our_kernels(folder: Path = ROOT / "csrc" / "cuda") -> set[str]:
    """Names of the __global__ functions in the sources."""
    names = set()
    for source in folder.rglob("*.cu*"):
        for text in source.read_text().split("__global__")[1:]:
            match = re.search(r"\b(\w+_kernel)\s*\(", text)
            if match:
                names.add(match.group(1))
    return names


def missing_kernels(wanted: set[str], ran: set[str]) -> list[str]:
    """Those of `wanted` that no name in `ran` (with its namespace and arguments) stands for."""
    return sorted(k for k in wanted if not any(re.search(rf"\b{k}\b", name) for name in ran))


def kernel_names(profile: torch.profiler.profile) -> dict[str, int]:
    """Demangled name -> launches."""
    kind = torch.autograd.DeviceType.CUDA
    return {e.key: e.count for e in profile.key_averages() if e.device_type == kind}


def named(names: tuple[str, ...]) -> list[cases.Case]:
    return [cases.BY_NAME[name] for name in names]


def smoke(few: bool) -> list[Difference]:
    """float16, which the ops do not have on the CPU, is only run."""
    pairs = cases.pairs([*cases.ROUTER_SPECS, *cases.DISPATCH_SPECS], named(NAMES))
    pairs += cases.pairs(cases.EXPERT_SPECS, named(FEW_EXPERT_NAMES if few else EXPERT_NAMES))
    found = []
    for spec, case in pairs:
        for dtype in (F32, BF16, F16):
            got = results_on(CUDA, spec, case, dtype)
            if dtype in CPU.dtypes:
                want = results_on(CPU, spec, case, dtype)
                found += differences(spec, case, dtype, (CUDA, got), (CPU, want))
    torch.cuda.synchronize()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="fewer cases of the expert ops")
    parser.add_argument("--profile", action="store_true", help="check which kernels ran")
    parser.add_argument("--json", type=Path, help="write names and launches to this file")
    arguments = parser.parse_args()
    require_device("cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    watch = torch.profiler.profile(activities=activities) if arguments.profile else nullcontext()
    with watch:
        found = smoke(arguments.few)
    failed = [d for d in found if not d.ok]
    for d in failed:
        print(f"{d.op} {d.case} {d.dtype} {d.result}: {d.error:.1e} of {d.bound:.1e} {d.reason}")
    missing: list[str] = []
    verdict = f"{len(found)} results compared with the CPU, {len(failed)} differ"
    if arguments.profile:
        wanted, ran = our_kernels(), kernel_names(watch)
        missing = missing_kernels(wanted, set(ran))
        verdict += f"; {len(wanted) - len(missing)} of {len(wanted)} kernels ran"
        if missing:
            verdict += f", not {', '.join(missing)}"
        if arguments.json:
            launches = [{"kernel": name, "launches": count} for name, count in ran.items()]
            write_json(arguments.json, launches)
    print(verdict)
    sys.exit(bool(failed or missing))


if __name__ == "__main__":
    main()
