# SPDX-License-Identifier: Apache-2.0
"""What is installed, what was loaded, whether each op works, and the fix for what does not.

`python -m unipool.doctor` needs the core install only; `unipool doctor` is the same command.
Exit code 0 if the ops work, 1 if something is broken, 2 for a wrong argument.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from unipool.options import nearest
from unipool.terminal import printable, say

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."
_MIN_TORCH = (2, 11)
_MIN_PYTHON = (3, 10)
_OPTIONAL = {  # package -> (extra that installs it, what it is for, least release)
    "transformers": ("train", "unipool.models, unipool train", (5, 17)),
    "accelerate": ("train", "unipool train", (0, 0)),
    "typer": ("train", "the unipool command", (0, 19)),
    "rich": ("train", "the unipool command", (0, 0)),
    "matplotlib": ("train", "reports", (0, 0)),
    "lm_eval": ("eval", "unipool eval", (0, 4)),
}
# What cudaGetErrorString says.
_NO_CODE_FOR_THIS_GPU = (
    "no kernel image is available",
    "invalid device function",
    "device kernel image is invalid",
    "the provided PTX was compiled with an unsupported toolchain",
)
_GPU_TROUBLE = ("out of memory", "busy or unavailable", "uncorrectable ECC", "not initialized")


def diagnose() -> dict:
    """The report as plain data; `problems` are what is broken, `notes` what is only absent."""
    report: dict = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "problems": [],
        "notes": [],
    }
    if sys.version_info < _MIN_PYTHON:
        _problem(
            report, f"Python {report['python']} is older than 3.10", "use Python 3.10 or newer"
        )
    torch = _check_torch(report)
    _check_cuda(report, torch)
    _check_packages(report)
    if torch is not None:
        _check_library(report, torch)
    report["ok"] = not report["problems"]
    return report


def _problem(report: dict, what: str, fix: str) -> None:
    report["problems"].append({"what": what, "fix": fix})


def _note(report: dict, what: str, fix: str) -> None:
    report["notes"].append({"what": what, "fix": fix})


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} logical cores"
    except OSError:
        pass
    return f"{platform.machine()}, {os.cpu_count()} logical cores"


def _check_torch(report: dict):
    try:
        import torch
    except (ImportError, OSError) as error:
        report["torch"] = None
        _problem(report, f"torch cannot be imported: {_line(error)}", "pip install 'torch>=2.11'")
        return None
    report["torch"] = torch.__version__
    report["threads"] = torch.get_num_threads()
    if release(torch.__version__) < _MIN_TORCH:
        _problem(
            report, f"torch {torch.__version__} is older than 2.11", "pip install 'torch>=2.11'"
        )
    return torch


def release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _check_cuda(report: dict, torch) -> None:
    cuda = report["cuda"] = {
        "torch_built_for": torch.version.cuda if torch is not None else None,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "toolkit": _toolkit(),
        "gpus": [],
    }
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            cuda["gpus"].append(
                {
                    "name": gpu.name,
                    "capability": f"{gpu.major}.{gpu.minor}",
                    "memory_gib": round(gpu.total_memory / 2**30, 1),
                }
            )
    elif cuda["driver"]:
        fix = "install a CUDA build of torch (https://pytorch.org/get-started), then " + REBUILD
        _note(report, f"driver {cuda['driver']} is there, but torch sees no GPU", fix)


def _toolkit() -> str | None:
    """Version and path of nvcc, from CUDA_HOME or the PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return None
    text = _command(nvcc, "--version") or ""
    release = next((w for w in text.replace(",", " ").split() if w.startswith("V")), "")
    return f"{release} {nvcc}".strip()


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _check_packages(report: dict) -> None:
    report["packages"] = {}
    missing: dict[str, list[str]] = {}
    for name, (extra, use, least) in _OPTIONAL.items():
        version = installed_version(name) if _importable(name) else None
        report["packages"][name] = version
        if version is None:
            missing.setdefault(extra, []).append(f"{name} ({use})")
        elif release(version) < least:
            wanted = ".".join(map(str, least))
            fix = f"pip install '{name}>={wanted}'"
            _note(report, f"{name} {version} is older than {wanted} ({use})", fix)
    for extra, names in missing.items():
        _note(report, "not installed: " + ", ".join(names), f'pip install "unipool[{extra}]"')


def _check_library(report: dict, torch) -> None:
    report["unipool"] = installed_version("unipool")
    report["build"], report["libraries"], report["self_test"] = None, [], []
    try:
        from unipool import __version__, _library, reference
        from unipool import ops as unipool_ops
    except (ImportError, OSError, RuntimeError) as error:
        _problem(report, _line(error), f"in the source folder: {REBUILD}")
        return
    report["unipool"] = __version__
    build = report["build"] = _build_info(report)
    architectures = build.get("cuda_architectures", "") if build else "not known"
    for path in map(Path, _library.loaded):
        on_gpu = "cuda" in path.name
        report["libraries"].append(
            {"file": str(path), "architectures": architectures if on_gpu else platform.machine()}
        )
    if build and release(build["torch"]) != release(torch.__version__):
        what = f"built for torch {build['torch']}, running under torch {torch.__version__}"
        _problem(report, what, f"in the source folder: {REBUILD}")
    has_cuda_ops = any("cuda" in Path(entry["file"]).name for entry in report["libraries"])
    if report["cuda"]["gpus"] and not has_cuda_ops:
        fix = f"install the CUDA toolkit, then UNIPOOL_CUDA=ON {REBUILD}"
        _note(report, "there is a GPU, but the CUDA ops were not built: the CPU ops are used", fix)
    devices = ["cpu"] + (["cuda"] if has_cuda_ops and report["cuda"]["gpus"] else [])
    for device in devices:
        report["self_test"] += self_test(torch, unipool_ops, reference, device)
    for result in report["self_test"]:
        if not result["ok"]:
            what = f"{result['op']} on {result['device']}: {result['detail']}"
            _problem(report, what, _advice(result["detail"]))


def _advice(detail: str) -> str:
    """What to do about an op that fails: another build helps only where this one does not fit."""
    if "CUDA error" not in detail:
        return f"in the source folder: {REBUILD}"
    if any(reason in detail for reason in _NO_CODE_FOR_THIS_GPU):
        return (
            "in the source folder, on this machine, so that the ops are built for its GPU: "
            f"UNIPOOL_CUDA=ON {REBUILD}"
        )
    if any(reason in detail for reason in _GPU_TROUBLE):
        return "free the GPU or check it (nvidia-smi), then run unipool doctor again"
    return (
        "a fault of unipool, which reinstalling does not change: please report it with the output "
        "of CUDA_LAUNCH_BLOCKING=1 unipool doctor --json"
    )


def _build_info(report: dict) -> dict | None:
    """None where the op libraries came without the extension module of this Python."""
    try:
        from unipool import _C
    except ImportError as error:
        what = f"no build information and no table of tiles: {_line(error)}"
        _note(report, what, f"in the source folder: {REBUILD}")
        return None
    return dict(_C.build_info())


def self_test(torch, ops, reference, device: str) -> list[dict]:
    """Each op, forward and backward, against the reference in float64: one entry an op."""
    generator = torch.Generator().manual_seed(0)
    T, M, D, F, k = 64, 7, 24, 40, 2

    def draw(*shape: int, scale: float = 1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device)

    logits, scale, bias = draw(T, M), torch.tensor(1.3, device=device), draw(M, scale=0.1)
    x, gate_up, down = draw(T, D), draw(M, 2 * F, D, scale=D**-0.5), draw(M, D, F, scale=F**-0.5)
    experts = torch.randint(0, M, (T, k), generator=generator).to(device)
    rows = draw(T * k, D)

    def plan(side, like):
        return side.dispatch_plan(experts.int(), M)

    def layer(side, x, logits, gate_up, down):
        routing = side.softmax_topk(logits, k)
        return side.expert_mlp(x, routing, gate_up, down)

    cases: dict[str, tuple[Callable, tuple]] = {
        "router_logits": (lambda side, x, w: side.router_logits(x, w), (x, gate_up[:, 0])),
        "norm_topk": (
            lambda side, z, s: side.norm_topk(z, s, k, calibration=2.0, bias=bias.to(z.dtype)),
            (logits, scale),
        ),
        "softmax_topk": (lambda side, z: side.softmax_topk(z, k), (logits,)),
        "dispatch_plan": (plan, (x,)),
        "permute": (lambda side, x: side.permute(x, plan(side, x)), (x,)),
        "unpermute": (lambda side, y: side.unpermute(y, plan(side, y)), (rows,)),
        "grouped_mm": (
            lambda side, a, b: side.grouped_mm(a, b, plan(side, a).offsets),
            (rows, gate_up),
        ),
        "expert_mlp": (layer, (x, logits, gate_up, down)),
    }
    return [
        {"op": name, "device": device} | _compare(torch, ops, reference, function, inputs)
        for name, (function, inputs) in cases.items()
    ]


def _compare(torch, ops, reference, function: Callable, inputs: tuple) -> dict:
    begin = time.perf_counter()
    try:
        got = _run(torch, ops, function, inputs)
        seconds = time.perf_counter() - begin
        wanted = _run(torch, reference, function, [t.double() for t in inputs])
        error = max((_difference(torch, g, w) for g, w in zip(got, wanted, strict=True)), default=0)
    except Exception as failure:  # whatever an op raises is the finding
        return {"ok": False, "detail": _line(failure), "milliseconds": None}
    # Sums of at most a few hundred float32 terms of order one.
    ok = error < 1e-4
    detail = f"greatest relative error {error:.1e}"
    return {"ok": ok, "detail": detail, "milliseconds": round(1e3 * seconds, 2)}


def _run(torch, side, function: Callable, inputs) -> list:
    """Outputs of function(side, *inputs), then the gradients of their weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    result = function(side, *leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    floating = [o for o in outputs if o.is_floating_point() and o.requires_grad]
    gradients = []
    if floating:
        total = sum(
            (
                o * torch.cos(torch.arange(o.numel(), device=o.device).to(o.dtype)).view(o.shape)
            ).sum()
            for o in floating
        )
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*outputs, *gradients]


def _difference(torch, got, wanted) -> float:
    """Greatest difference over the greatest wanted magnitude; infinite if only one is there."""
    if got is None or wanted is None:
        return 0.0 if got is wanted else float("inf")
    if got.shape != wanted.shape:
        return float("inf")
    if not got.is_floating_point():
        return 0.0 if torch.equal(got.long(), wanted.long()) else float("inf")
    size = wanted.detach().abs().max().clamp(min=1e-30)
    error = ((got.detach().double() - wanted.detach()).abs().max() / size).item()
    return error if error == error else float("inf")  # NaN is no agreement


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def render(report: dict) -> str:
    """The report as text for a terminal."""
    cuda, build = report["cuda"], report.get("build") or {}
    lines = [
        f"unipool    {report.get('unipool') or 'not installed'}",
        f"torch      {report['torch'] or 'not installed'}"
        + (f", {report['threads']} threads" if report["torch"] else ""),
        f"python     {report['python']} on {report['platform']}",
        f"processor  {report['processor']}",
    ]
    if build:
        rest = ", ".join(
            f"{k} {v}" for k, v in build.items() if k not in ("version", "torch") and v
        )
        lines.append(f"build      for torch {build['torch']}, {rest}")
    for entry in report.get("libraries", []):
        lines.append(f"library    {entry['file']} ({entry['architectures'] or 'unknown'})")
    lines += [
        f"GPU        {g['name']}, sm_{g['capability'].replace('.', '')}, {g['memory_gib']} GiB"
        for g in cuda["gpus"]
    ] or ["GPU        none"]
    lines += [
        f"CUDA       torch built for {cuda['torch_built_for'] or 'the CPU only'}, "
        f"driver {cuda['driver'] or 'none'}, toolkit {cuda['toolkit'] or 'none'}",
        "packages   "
        + ", ".join(
            f"{name} {version or 'missing'}" for name, version in report["packages"].items()
        ),
        "",
    ]
    for result in report.get("self_test", []):
        mark = "ok    " if result["ok"] else "FAILED"
        lines.append(f"{mark} {result['op']:14} {result['device']:5} {result['detail']}")
    for kind, name in (("notes", "note"), ("problems", "problem")):
        for entry in report[kind]:
            lines += [f"{name}: {entry['what']}", f"    fix: {entry['fix']}"]
    lines.append("all ops work" if report["ok"] else "unipool is broken here, see above")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="unipool doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = nearest(unknown[0], ["--json", "--help"])
        what = printable(f"doctor: unknown argument {unknown[0]!r}{near}")
        print(f"unipool: {what} (see --help)", file=sys.stderr)
        return 2
    report = diagnose()
    say(json.dumps(report, indent=1) if options.json else render(report), lines=True)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
