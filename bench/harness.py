# SPDX-License-Identifier: Apache-2.0
"""Timing of several ways to do the same thing: results are compared first, then runs interleave."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rehearsal import is_rehearsal

import unipool


@dataclass
class Timing:
    """Seconds of one way: median and the 10th and 90th percentiles over the runs."""

    name: str
    median: float
    p10: float
    p90: float
    runs: int

    def __str__(self) -> str:
        ms = [1e3 * s for s in (self.median, self.p10, self.p90)]
        return f"{self.name:<28} {ms[0]:9.3f} ms [{ms[1]:.3f}, {ms[2]:.3f}]"


PIECE = 2**24  # elements that are in float64 at once: a pool's gradient has billions


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|got - wanted|_2 / |wanted|_2 in float64."""
    if got.shape != wanted.shape:
        raise ValueError(f"shapes {list(got.shape)} and {list(wanted.shape)}")
    wrong = total = torch.zeros((), dtype=torch.float64, device=wanted.device)
    for a, b in zip(got.flatten().split(PIECE), wanted.flatten().split(PIECE), strict=True):
        b = b.double()
        wrong = wrong + (a.double() - b).square().sum()
        total = total + b.square().sum()
    return (wrong / total).sqrt().item()


def require_close(what: str, got: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    """Raises before anything is timed if two ways disagree."""
    error = relative_error(got, wanted)
    if not error <= bound:
        raise RuntimeError(f"{what}: relative error {error:.2e} exceeds {bound:.0e}, not timed")


def require_device(device: str) -> None:
    """Ends the program, with one line and exit status 2, unless this machine has `device`."""
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).stem}: needs an NVIDIA GPU and a CUDA torch, found none")
        sys.exit(2)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


SAMPLE_SECONDS = 0.02


def interleave(
    ways: dict[str, Callable[[], object]], *, warmup: int, runs: int, device: str = "cpu"
) -> list[Timing]:
    """Runs the ways in turn, A B A B ...: a drift of the machine's speed meets all alike.

    A sample of a short way is the mean of as many calls in a row as take 20 ms, as in a program
    that calls it again and again.
    """
    calls = {}
    for name, way in ways.items():
        for _ in range(warmup):
            way()
        calls[name] = max(1, round(SAMPLE_SECONDS / _seconds(way, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            seconds[name].append(_seconds(way, calls[name], device))
    return [_summary(name, values) for name, values in seconds.items()]


def _seconds(way: Callable[[], object], calls: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        way()
    synchronize(device)
    return (time.perf_counter() - start) / calls


FLUSH_BYTES = 256 * 10**6  # more than any GPU's L2


def interleave_on_gpu(
    ways: dict[str, Callable[[], object]], *, warmup: int, runs: int
) -> tuple[list[Timing], float]:
    """CUDA events around one call of a way, in turn, each with an L2 that holds nothing of it and
    nothing to be written back: it is filled by reading. Also the share of the GPU's time that the
    host needed to enqueue it all: only well below 1 was the GPU never idle inside a call."""
    elements = FLUSH_BYTES // 4 if not is_rehearsal() else 4
    flush = torch.zeros(elements, device="cuda")
    for way in ways.values():
        for _ in range(warmup):
            way()
    torch.cuda.synchronize()
    pairs: dict[str, list] = {name: [] for name in ways}
    host = time.perf_counter()
    for _ in range(runs):
        for name, way in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            start.record()
            way()
            end.record()
            pairs[name].append((start, end))
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    found = [
        _summary(name, [1e-3 * start.elapsed_time(end) for start, end in events])
        for name, events in pairs.items()
    ]
    first, last = next(iter(pairs.values()))[0][0], list(pairs.values())[-1][-1][1]
    return found, host / (1e-3 * first.elapsed_time(last))


def _summary(name: str, seconds: list[float]) -> Timing:
    deciles = statistics.quantiles(seconds, n=10)
    return Timing(name, statistics.median(seconds), deciles[0], deciles[-1], len(seconds))


def environment() -> dict:
    """What a figure depends on and must be told with it."""
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        gpu["rehearsal"] = is_rehearsal()
    return {
        "unipool": unipool.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        **gpu,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def write_json(path: Path, results: list[dict], **more: object) -> None:
    """Called after each result: a program that is stopped loses only what it had not done."""
    document = {"environment": environment(), **more, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def as_result(case: dict, timings: list[Timing], **derived: object) -> dict:
    return {**case, "timings": [asdict(t) for t in timings], **derived}
