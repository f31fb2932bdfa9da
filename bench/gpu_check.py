# SPDX-License-Identifier: Apache-2.0
"""Everything that needs an NVIDIA GPU, in one run:

    bench/gpu_check.sh OUT [--prebuilt DIR] [--seconds N] [--only STEP ...] [--archive FILE]
    bench/gpu_check.sh OUT --rehearse       on the software GPU, small: shows that this runs
    bench/gpu_check.sh --pack DIR [--libraries DIR]     makes what --prebuilt takes

Builds the ops (or takes DIR/lib/libunipool_{cpu,cuda}.so and compiles nothing), runs every kernel
once (smoke, two minutes at most), the tests of cuda, compute-sanitizer, and the benchmarks. Each
step has a time limit; together they keep to --seconds, and what a step leaves goes to those after
it. OUT gets JSON and logs; OUT/summary.json says how each step ended and is written again after
each: passed, failed, stopped (at its limit; what it had written stays), not run (a tool is missing)
or not started (the time was over). A run on a real GPU ends with the rows of docs/hardware.md, in
the page itself if OUT is in bench/results, else in OUT/hardware.md. Exit status: 0 if all is well,
1 if a step failed, 3 if one was stopped or not started, 2 for a wrong call or no GPU.
"""

import argparse
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import gpu_package

ROOT = Path(__file__).resolve().parents[1]
BENCH, TESTS = ROOT / "bench", ROOT / "tests"
OURS = (BENCH, TESTS / "support", ROOT / "profiling")  # where tests import from
SECONDS = 530  # of the whole check
LEAST_SECONDS = 5  # with less left, a step is not started
REHEARSAL_CASES = ("one_token", "dropped")
SANITIZERS = {"memcheck": 45, "racecheck": 45, "initcheck": 30, "synccheck": 30}
SANITIZER_ERROR = 9  # exit status
OUR_KERNEL = re.compile(r"^=+ +at .*\bunipool::", re.MULTILINE)  # where an error was found
# What the tools say where they cannot look into the GPU: no fault of a kernel.
NO_TOOL = ("Device not supported", "Failed to initialize the profiler", "ERR_NVGPUCTRPERM")
SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm",
              "clocks.max.mem", "power.limit")  # fmt: skip


def die(why: str) -> None:
    print(f"gpu_check: {why}", file=sys.stderr)
    sys.exit(2)


# --- steps


@dataclass(frozen=True)
class Step:
    """A command with its time limit, or the reason why it cannot run here."""

    name: str
    seconds: int = 0
    command: tuple[object, ...] = ()
    not_run: str = ""
    first: bool = False  # gets its whole limit; the others share what is left
    needed: bool = False  # nothing after it makes sense without it
    expect: str = ""  # what the log has to say
    tool: bool = False  # runs under a tool that may not work on this machine
    ours_only: bool = False  # a sanitizer's errors count in our kernels only
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    status: str = "not started"
    seconds: int = 0
    detail: str = ""


def limit_of(steps: list[Step], left: float) -> float:
    """Of the first of these steps: its share of the time that is left, by their limits."""
    step = steps[0]
    if step.first:
        return min(step.seconds, left)
    return min(step.seconds, left * step.seconds / sum(s.seconds for s in steps))


def last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].replace("\t", " ")[:150] if lines else ""


def verdict(step: Step, code: int | None, limit: float, log: str) -> tuple[str, str]:
    """Status and detail of a step that has ended; code: its exit status, None if it was stopped."""
    detail = last_line(log)
    if step.tool:
        for reason in (line for line in log.splitlines() if any(sign in line for sign in NO_TOOL)):
            return "not run", f"does not work here: {reason.strip()[:100]}"
    if code is None:
        return "stopped", f"after {limit:.0f} s" + (f"; {detail}" if detail else "")
    if step.ours_only and code == SANITIZER_ERROR and not OUR_KERNEL.search(log):
        return "passed", f"none in a kernel of unipool; {detail}"
    if code != 0:
        return "failed", f"exit status {code}; {detail}"
    if step.expect not in log:
        return "failed", f"its log does not say '{step.expect}'; {detail}"
    return "passed", detail


def run_step(step: Step, limit: float, log: Path) -> tuple[str, str]:
    environment = {**os.environ, **step.environment}
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, step.command)), stdout=out, stderr=subprocess.STDOUT, env=environment,
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    return verdict(step, code, limit, log.read_text(errors="replace"))


def stop(process: subprocess.Popen) -> None:
    """The process and all that it started; 5 s to end by itself."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


class Check:
    """Runs steps in order; after each, OUT/summary.json says how all of them stand."""

    def __init__(self, out: Path, seconds: float, about: dict, archive: Path | None = None) -> None:
        self.out, self.about, self.archive = out, about, archive
        self.begin = time.monotonic()
        self.seconds = seconds
        self.outcomes: list[Outcome] = []

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begin

    def run(self, steps: list[Step]) -> None:
        self.outcomes = [Outcome(step.name) for step in steps]
        why_not = ""
        for i, (step, outcome) in enumerate(zip(steps, self.outcomes, strict=True)):
            waiting = [s for s in steps[i:] if not s.not_run]
            left = self.seconds - self.spent
            if step.not_run:
                outcome.status, outcome.detail = "not run", step.not_run
            elif why_not or left < LEAST_SECONDS:
                outcome.detail = why_not or f"the {self.seconds:.0f} s of the whole check are over"
            else:
                self.run_one(step, outcome, limit_of(waiting, left))
                if step.needed and outcome.status != "passed":
                    why_not = f"{step.name} did not pass"
            self.write()

    def run_one(self, step: Step, outcome: Outcome, limit: float) -> None:
        print(f"gpu_check: {step.name} (at most {limit:.0f} s)", flush=True)
        begin = self.spent
        outcome.status, outcome.detail = "stopped", "from outside"
        try:
            outcome.status, outcome.detail = run_step(step, limit, self.out / f"{step.name}.log")
        finally:
            outcome.seconds = round(self.spent - begin)
            self.write()

    def has(self, *statuses: str) -> bool:
        return any(outcome.status in statuses for outcome in self.outcomes)

    @property
    def unfinished(self) -> bool:
        return self.has("stopped", "not started")

    def write(self) -> None:
        summary = {
            **self.about,
            "seconds": round(self.spent),
            "passed": not self.has("failed"),
            "complete": not self.unfinished,
            "steps": [asdict(outcome) for outcome in self.outcomes],
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if self.archive:
            with tarfile.open(self.archive, "w:gz") as archive:
                archive.add(self.out, arcname=self.out.name)

    def print_table(self) -> None:
        about = self.about
        kind = "rehearsal on " if about["rehearsal"] else ""
        print(f"\n{kind}{about['gpu']}, driver {about['driver']}, torch {about['torch']}, "
              f"commit {about['commit'][:12]}, {self.spent:.0f} s")  # fmt: skip
        for o in self.outcomes:
            print(f"{o.name:<18}{o.status:<12}{o.seconds:>4} s  {o.detail}")

    @property
    def exit_status(self) -> int:
        return 1 if self.has("failed") else 3 if self.unfinished else 0


# --- the plan


def missing_package(path: Path) -> str:
    """Of those that a test file, or what it shares with others, imports at its top; empty if there
    is none. Prebuilt libraries come without unipool._C, which is made for one Python."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "unipool" and any(alias.name == "_C" for alias in node.names):
                extension = ROOT / "unipool" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
                names += [] if extension.exists() else ["unipool._C"]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            shared = TESTS / "support" / f"{top}.py"
            ours = top == "unipool" or any((f / f"{top}.py").exists() for f in OURS)
            if name == "unipool._C":
                return name
            if shared.exists() and (deeper := missing_package(shared)):
                return deeper
            if not ours and find_spec(top) is None:
                return top
    return ""


def test_files() -> Iterator[Path]:
    """Not those of the software GPU itself, nor of this check."""
    for path in sorted(TESTS.rglob("test_*.py")):
        if path.parent.name != "softgpu" and path.stem != "test_gpu_check":
            yield path


def test_steps(out: Path, rehearse: bool, workers: int) -> list[Step]:
    steps, files = [], []
    for path in test_files():
        if package := missing_package(path):
            steps.append(Step(f"tests-{path.stem}", not_run=f"{package} is not installed"))
        else:
            files.append(path.relative_to(ROOT))
    which = "cuda and one_token" if rehearse else "cuda or test_large.py"
    parallel = ("-n", workers) if workers > 1 and find_spec("xdist") else ()
    command = (sys.executable, "-m", "pytest", "-q", "-k", which, "-p", "no:cacheprovider",
               *parallel, "--junitxml", out / "tests.xml", *files)  # fmt: skip
    # Nothing is compiled in this step.
    steps.append(Step("tests", 120, command))
    return steps


def sanitizer_steps(rehearse: bool) -> list[Step]:
    program = shutil.which("compute-sanitizer")
    why_not = "" if program else "compute-sanitizer is not installed (it comes with the toolkit)"
    if rehearse:
        why_not = "a sanitizer cannot look into a software GPU"
    steps = []
    only_ours = ("--kernel-regex", "kns=unipool")
    more = {
        "memcheck": ("--report-api-errors", "no"),  # PyTorch makes calls that may fail
        "racecheck": only_ours,
        "initcheck": ("--print-limit", 10000),  # it has to see what other kernels write
        "synccheck": only_ours,
    }
    for tool, seconds in SANITIZERS.items():
        command = (program, "--tool", tool, "--error-exitcode", SANITIZER_ERROR, *more[tool],
                   sys.executable, BENCH / "gpu_smoke.py", "--few")  # fmt: skip
        # Each allocation on its own: a row past a tensor's end is past an allocation's end.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(
            Step(tool, seconds, command, why_not, expect="SUMMARY: 0", tool=True,
                 ours_only=tool == "initcheck", environment=alone)
        )  # fmt: skip
    return steps


def bench_step(
    name: str, seconds: int, out: Path, script: str, *options: object, not_run: str = ""
) -> Step:
    command = (sys.executable, BENCH / f"{script}.py", *options, "--json", out / f"{name}.json")
    return Step(name, seconds, command, not_run)


def bench_steps(out: Path, rehearse: bool) -> list[Step]:
    small = ("--rehearse",) if rehearse else ()
    transformers = find_spec("transformers") is not None
    # A rehearsal compiles nothing.
    compiled = ["grouped_mm compiled"] if find_spec("triton") and not rehearse else []
    peers = ["grouped_mm", *compiled, *(["transformers grouped_mm"] if transformers else [])]
    # The width and pool of two scales, four layers of it; models of Hugging Face as published.
    scales = {
        "182m": "--layers 4 --tokens 32768 --d-model 768 --d-ff 3072 --experts 96",
        "830m": "--layers 4 --tokens 8192 --d-model 1024 --d-ff 4096 --experts 384",
    }
    widths = "--widths full --layers 2 --tokens 8192"
    if rehearse:
        scales = {"182m": "--layers 2 --tokens 64 --d-model 32 --d-ff 48 --experts 6 --runs 2"}
        widths = "--widths tiny --layers 1 --tokens 16 --decode-tokens 1 --runs 2 --model olmoe"
    on_gpu = ("--device", "cuda", "--dtype", "bfloat16")
    pool_steps = [
        bench_step(f"pool_step_{name}", 45, out, "pool_step", *on_gpu, *sizes.split(), "--peers",
                   *peers)
        for name, sizes in scales.items()
    ]  # fmt: skip
    why_not = "" if transformers else "transformers is not installed"
    models = bench_step(
        "integration", 45, out, "bench_integration", *on_gpu, *widths.split(), not_run=why_not
    )
    cases = ("--case", *REHEARSAL_CASES) if rehearse else ()
    return [
        bench_step("bench_kernels", 45, out, "bench_kernels", *small),
        bench_step("bench_experts", 75, out, "bench_experts", *small),
        *pool_steps,
        models,
        bench_step("compare_backends", 50, out, "compare_backends", *cases),
    ]


def ncu_step(out: Path, rehearse: bool) -> Step:
    program = shutil.which("ncu")
    why_not = "" if program else "ncu is not installed (it comes with the toolkit)"
    if rehearse:
        why_not = "a profiler cannot look into a software GPU"
    sections = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis")
    options = [f"--section={section}" for section in sections]
    # Clocks stay as they are.
    options += ["--clock-control=none", "--kernel-name=regex:expert|to_tokens|wgrad"]
    target = (sys.executable, BENCH / "bench_experts.py", "--once", "182m")
    return Step(
        "ncu", 40, (program, *options, "--export", out / "ncu", *target), why_not, tool=True
    )


def plan(out: Path, prebuilt: bool, rehearse: bool, package: Path) -> list[Step]:
    steps = []
    if not prebuilt:
        # Into a folder of its own: what is installed in this environment stays as it is.
        command = gpu_package.build_command(package)
        steps.append(Step("build", 270, command, first=True, needed=True,
                          environment=gpu_package.build_environment()))  # fmt: skip
    smoke = (sys.executable, BENCH / "gpu_smoke.py", "--json", out / "smoke.json")  # fmt: skip
    steps.append(Step("smoke", 120, smoke, first=True))
    workers = 1 if rehearse else max(1, min(8, (os.cpu_count() or 1) // 2))
    steps += test_steps(out, rehearse, workers)
    steps += [*sanitizer_steps(rehearse), *bench_steps(out, rehearse), ncu_step(out, rehearse)]
    # A rehearsal takes seconds per step, but its machine may be busy.
    return [replace(step, seconds=2 * step.seconds) for step in steps] if rehearse else steps


# --- where it runs

PROBE = """
import json, torch
from rehearsal import software_gpu
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
print(json.dumps({**versions, "gpu": gpu, "software": software_gpu()}))
"""


def probe(environment: dict[str, str]) -> dict:
    """Versions and the GPU, by a process of its own: this one holds no memory of the GPU."""
    command = [sys.executable, "-c", "import torch"]
    if subprocess.run(command, capture_output=True, env=environment).returncode:
        die(f"{sys.executable} cannot import torch: set PYTHON")
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True,
                         env=environment)  # fmt: skip
    if run.returncode:
        die(f"the GPU cannot be asked for its name: {last_line(run.stderr)}")
    return json.loads(run.stdout.splitlines()[-1])


def nvidia_smi() -> dict[str, str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        values = [value.strip() for value in text.splitlines()[0].split(",")]
        return dict(zip(SMI_FIELDS, values, strict=False))
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}


def commit() -> str:
    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        except OSError:
            return ""
        return run.stdout.strip()

    name = os.environ.get("UNIPOOL_COMMIT") or git("rev-parse", "HEAD") or "unknown"
    return name + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def about(found: dict, rehearse: bool) -> dict:
    smi = nvidia_smi() if not found["software"] else {}
    return {
        "rehearsal": rehearse or found["software"],
        "gpu": smi.pop("name", None) or found["gpu"],
        "driver": smi.pop("driver_version", "unknown"),
        "torch": found["torch"],
        "cuda": found["cuda"],
        "commit": commit(),
        "clocks": smi,
    }


# --- main


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a new folder")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="compile nothing")
    parser.add_argument("--rehearse", action="store_true", help="small, on the software GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole check")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="and the build")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="OUT as .tar.gz, kept current")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="make what --prebuilt takes")
    parser.add_argument("--libraries", type=Path, metavar="DIR", help="for --pack: built already")
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.pack is None):
        parser.error("OUT or --pack DIR is needed, not both")
    return options


def libraries(prebuilt: Path) -> Path:
    """The folder of prebuilt libraries, which load in this environment."""
    for name in gpu_package.LIBRARIES:
        if not (prebuilt / "lib" / name).is_file():
            die(f"{prebuilt}/lib/{name} is missing")
    folder = (prebuilt / "lib").resolve()
    found = gpu_package.loaded(folder)
    if found["missing"]:
        die(f"no CUDA kernel for {', '.join(found['missing'])}")
    return folder


def chosen(steps: list[Step], only: list[str]) -> list[Step]:
    names = [step.name for step in steps]
    if unknown := [name for name in only if name not in names]:
        die(f"no step {unknown[0]}: there are {', '.join(names)}")
    return [step for step in steps if not only or step.name in only or step.needed]


def write_docs(out: Path) -> None:
    """The rows of docs/hardware.md, of a real GPU only."""
    command = [sys.executable, BENCH / "hardware_table.py"]
    if out.parent != BENCH / "results":
        command += [out, "--to", out / "hardware.md"]
    subprocess.run(list(map(str, command)), check=False)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.pack:
        gpu_package.pack(options.pack, options.libraries)
        return
    if (options.out / "summary.json").exists():
        die(f"{options.out} holds the results of another run")
    path = os.pathsep.join([str(ROOT), str(BENCH), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    if options.rehearse:
        os.environ |= {"UNIPOOL_REHEARSAL": "1"}
        os.environ.setdefault("SOFTGPU_SMS", "8")
    if options.prebuilt:
        os.environ["UNIPOOL_LIBRARY_DIR"] = str(libraries(options.prebuilt))
    found = probe(os.environ.copy())
    if found["gpu"] is None:
        die("needs an NVIDIA GPU and a CUDA torch, found none")
    if found["software"] and not options.rehearse:
        die("this GPU is a software one: say --rehearse")
    with tempfile.TemporaryDirectory() as package:
        if not options.prebuilt:
            os.environ["UNIPOOL_LIBRARY_DIR"] = str(gpu_package.library_folder(Path(package)))
        out = options.out.resolve()
        steps = plan(out, options.prebuilt is not None, options.rehearse, Path(package))
        steps = chosen(steps, options.only)
        out.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        check = Check(out, options.seconds, about(found, options.rehearse), options.archive)
        check.run(steps)
    check.print_table()
    if not check.about["rehearsal"]:
        write_docs(out)
    sys.exit(check.exit_status)


if __name__ == "__main__":
    main()
