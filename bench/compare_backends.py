# SPDX-License-Identifier: Apache-2.0
"""The same named cases on the GPU and on the CPU.

    python bench/compare_backends.py [--json FILE] [--case NAME ...]

Forward and backward of every op on tests/support/cases.py, in the dtypes that both have. Integers
must be equal. A float's error is the greatest |a - b| over the greatest |b|, which may be twice
what tests/support/tolerance.py allows one of them from the exact result.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import require_device, write_json
from torch import Tensor

from unipool import ops

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import cases  # noqa: E402
import specs  # noqa: E402
from cases import Case  # noqa: E402
from specs import OpSpec  # noqa: E402
from tolerance import PER_ROW, unit_error  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Backend:
    """Kernels, named after the device on which their tensors live."""

    name: str
    dtypes: tuple[torch.dtype, ...]


CPU = Backend("cpu", (F32, BF16))
CUDA = Backend("cuda", (F32, BF16, F16))


@dataclass(frozen=True)
class Difference:
    """One result of an op, `a` against `b`. error and bound are relative; integers: 0 or 1, and 0.

    `reason` says what no number says: a missing result, another shape, NaN in other places."""

    op: str
    case: str
    dtype: str
    a: str
    b: str
    result: str
    error: float
    bound: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason and self.error <= self.bound

    @property
    def rank(self) -> tuple[bool, float]:
        """Greater for what is nearer to its bound, or past it."""
        return not self.ok, self.error / self.bound if self.bound else self.error


def results_on(backend: Backend, spec: OpSpec, case: Case, dtype: torch.dtype) -> dict:
    """Results and gradients of an op on a backend, on the CPU."""
    inputs = specs.to_device(spec.inputs(case, dtype), torch.device(backend.name))
    results = specs.run(spec, case, ops, inputs)
    return {name: None if t is None else t.cpu() for name, t in results.items()}


def compare_tensors(got: Tensor | None, want: Tensor | None, size: float) -> tuple[float, str]:
    """(relative error, reason) of two results; `size` is the least magnitude to relate it to."""
    if got is None or want is None:
        return 0.0, "" if got is want else "missing on one side"
    if got.shape != want.shape or got.dtype != want.dtype:
        return 1.0, f"{got.dtype} {list(got.shape)} against {want.dtype} {list(want.shape)}"
    if not want.is_floating_point():
        wrong = int((got != want).sum())
        return float(wrong > 0), f"{wrong} integers differ" if wrong else ""
    a, b = got.double(), want.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return 1.0, "NaN in other places"
    error = (a - b).nan_to_num(0.0).abs()
    if error.numel() == 0 or not error.any():
        return 0.0, ""
    scale = max(b.nan_to_num(0.0).abs().max().item(), size)
    return (error.max().item() / scale, "") if scale > 0 else (1.0, "zero on one side only")


def differences(
    spec: OpSpec, case: Case, dtype: torch.dtype, a: tuple[Backend, dict], b: tuple[Backend, dict]
) -> list[Difference]:
    """Of every result and gradient of an op; a and b are a backend with what it gave."""
    found = []
    tolerances = spec.tolerances(case)
    inputs = spec.inputs(case, dtype)
    for name, want in b[1].items():
        bound = size = 0.0
        if want is not None and want.is_floating_point() and name in tolerances:
            tolerance = tolerances[name]
            bound = 2 * PER_ROW * unit_error(tolerance, dtype)
            magnitude = tolerance.magnitude
            magnitude = magnitude(inputs) if callable(magnitude) else torch.tensor(magnitude)
            size = magnitude.max().item() if magnitude.numel() else 0.0
        error, reason = compare_tensors(a[1][name], want, size)
        short = str(dtype).removeprefix("torch.")
        pair = (a[0].name, b[0].name)
        found.append(Difference(spec.name, case.name, short, *pair, name, error, bound, reason))
    return found


def compare(names: list[str]) -> list[Difference]:
    """Of the cases with these names, or of all."""
    found = []
    chosen = [cases.BY_NAME[name] for name in names] if names else cases.CASES
    for spec, case in specs.pairs(specs.SPECS, chosen):
        for dtype in (dtype for dtype in CUDA.dtypes if dtype in CPU.dtypes):
            got, want = (results_on(backend, spec, case, dtype) for backend in (CUDA, CPU))
            found += differences(spec, case, dtype, (CUDA, got), (CPU, want))
    return found


def grouped(found: list[Difference], *fields: str) -> list[list[Difference]]:
    """Those with the same fields together, the worst first."""
    groups: dict[tuple, list[Difference]] = {}
    for d in found:
        groups.setdefault(tuple(getattr(d, f) for f in fields), []).append(d)
    return [sorted(g, key=lambda d: d.rank, reverse=True) for _, g in sorted(groups.items())]


def print_worst(found: list[Difference]) -> None:
    """A line for each op and pair of backends: the result nearest to its bound or past it."""
    for group in grouped(found, "op", "a", "b"):
        d = group[0]
        what = f"{d.result} of {d.case} in {d.dtype}"
        verdict = "ok" if d.ok else f"DIFFERS {d.reason}"
        print(f"{d.op:<26}{d.a:>9} - {d.b:<9}{d.error:9.1e} of {d.bound:7.1e}  {what}  {verdict}")


def as_results(found: list[Difference]) -> list[dict]:
    """For each op, dtype and pair: the greatest relative error of each case, and what failed."""
    results = []
    for group in grouped(found, "op", "dtype", "a", "b"):
        first = group[0]
        worst = {g[0].case: max(d.error for d in g) for g in grouped(group, "case")}
        failed = [asdict(d) for d in group if not d.ok]
        about = {f: getattr(first, f) for f in ("op", "dtype", "a", "b")}
        results.append({**about, "compared": len(group), "error": worst, "failed": failed})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all differences to this file")
    parser.add_argument("--case", nargs="+", default=[], help="only these", choices=cases.BY_NAME)
    arguments = parser.parse_args()
    require_device("cuda")
    found = compare(arguments.case)
    print_worst(found)
    failed = [d for d in found if not d.ok]
    print(f"{len(found)} results compared with the CPU, {len(failed)} differ")
    if arguments.json:
        write_json(arguments.json, as_results(found))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
