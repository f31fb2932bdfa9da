# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, forward and backward, on small shapes of a GPU, compared with the CPU.

    python bench/gpu_smoke.py [--few] [--json FILE]

The first thing to run on a GPU: two minutes at most. An op that fails does not stop the others,
unless it has broken the GPU's context. It fails, too, if a kernel of csrc/cuda is not among those
that the profiler saw. --few is for sanitizers, which slow kernels down: fewer cases, and no list
of kernels.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from compare_backends import (
    CPU,
    CUDA,
    ROOT,
    Difference,
    as_results,
    cases,
    differences,
    results_on,
    specs,
)
from harness import require_device, write_json
from rehearsal import is_rehearsal, software_gpu

NAMES = ("one_token", "ties", "ragged", "M_not_pow2", "dropped", "k_is_M", "pool_384", "pool_1024")
EXPERT_NAMES = ("one_token", "ragged", "M_not_pow2", "dropped", "all_to_one_expert", "k_is_M")
FEW_NAMES = ("M_not_pow2", "dropped")
# Those for which an H100 takes tiles of 32, 64 and 128 rows: the small ones get 16.
LARGE = [
    cases.Case("tiles_of_32", 4096, 2, 1, 64, 64),
    cases.Case("tiles_of_64", 8192, 2, 1, 128, 64),
    cases.Case("tiles_of_128", 2048, 8, 2, 512, 512),
]
TILE = re.compile(r"\bTile<(\w+), (\d+), (\d+)")

Pair = tuple[specs.OpSpec, cases.Case]


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


def tiles_of(names: set[str]) -> list[str]:
    """`64x128 __half` for the tiles of these instances of kernels."""
    found = {match.groups() for name in names if (match := TILE.search(name))}
    ordered = sorted(found, key=lambda t: (t[0], int(t[1])))
    return [f"{rows}x{columns} {dtype}" for dtype, rows, columns in ordered]


@contextmanager
def launches() -> Iterator[dict[str, int]]:
    """Demangled name -> launches, of the kernels that the block runs; filled at its end."""
    found: dict[str, int] = {}
    if software_gpu():
        import softgpu

        with softgpu.calls() as calls:
            yield found
        for call in calls:
            if kernel := call.get("kernel"):
                found[kernel] = found.get(kernel, 0) + 1
        return
    kind = torch.autograd.DeviceType.CUDA
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
        yield found
    found |= {e.key: e.count for e in watch.key_averages() if e.device_type == kind}


def named(names: tuple[str, ...]) -> list[cases.Case]:
    return [cases.BY_NAME[name] for name in names]


def pairs(few: bool) -> list[Pair]:
    small, products = ([named(FEW_NAMES)] * 2) if few else (named(NAMES), named(EXPERT_NAMES))
    if not few and not is_rehearsal():
        products = products + LARGE
    chosen = specs.pairs([*specs.ROUTER_SPECS, specs.ROUTER_LOGITS, *specs.DISPATCH_SPECS], small)
    return chosen + specs.pairs(specs.EXPERT_SPECS, products)


def context_works() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def smoke(
    chosen: list[Pair], run: Callable[..., dict] = results_on
) -> tuple[list[Difference], list[str]]:
    """Results against the CPU's, and a line for each op that raised. float16, which the ops do not
    have on the CPU, is only run."""
    found: list[Difference] = []
    raised: list[str] = []
    for spec, case in chosen:
        for dtype in CUDA.dtypes:
            try:
                got = run(CUDA, spec, case, dtype)
            except RuntimeError as error:
                raised.append(f"{spec.name} {case.name} {dtype}: {str(error).splitlines()[0]}")
                if not context_works():
                    return found, [*raised, "the context is broken: nothing more can run"]
                continue
            if dtype in CPU.dtypes:
                want = run(CPU, spec, case, dtype)
                found += differences(spec, case, dtype, (CUDA, got), (CPU, want))
    return found, raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="fewer cases, for sanitizers")
    parser.add_argument("--json", type=Path, help="write differences and launches to this file")
    arguments = parser.parse_args()
    require_device("cuda")
    if arguments.few:  # a sanitizer and the profiler do not go together
        (found, raised), ran = smoke(pairs(few=True)), {}
    else:
        with launches() as ran:
            found, raised = smoke(pairs(few=False))
    failed = [d for d in found if not d.ok]
    for d in failed:
        print(f"{d.op} {d.case} {d.dtype} {d.result}: {d.error:.1e} of {d.bound:.1e} {d.reason}")
    print("".join(f"{line}\n" for line in raised), end="")
    verdict = f"{len(found)} results compared with the CPU, {len(failed)} differ"
    if raised:
        verdict += f"; {len(raised)} calls failed"
    missing: list[str] = []
    if not arguments.few and not ran:
        verdict += "; the profiler saw no kernel"  # which is no fault of the kernels
    elif not arguments.few:
        wanted = our_kernels()
        missing = missing_kernels(wanted, set(ran))
        verdict += f"; {len(wanted) - len(missing)} of {len(wanted)} kernels ran"
        verdict += f", not {', '.join(missing)}" if missing else ""
        print(f"tiles: {', '.join(tiles_of(set(ran)))}")
    if arguments.json:
        kernels = [{"kernel": name, "launches": count} for name, count in ran.items()]
        write_json(arguments.json, as_results(found), raised=raised, kernels=kernels)
    print(verdict)
    sys.exit(bool(failed or raised or missing))


if __name__ == "__main__":
    main()
