# SPDX-License-Identifier: Apache-2.0
"""A sweep in one folder.

<out>/sweep.json                    the models, seeds and options, as resolved
<out>/runs/<model>/seed-<n>/        one run each, as `unipool train` writes it
<out>/results.json table.md *.png report.html    what came of it; see summary.py and report.py
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from unipool.compare.grid import Baseline, Variant
from unipool.compare.members import Member, run_members
from unipool.compare.report import show, write_results
from unipool.compare.summary import summarize
from unipool.training.checkpoint import write_text
from unipool.training.config import TrainConfig
from unipool.training.errors import InputError
from unipool.training.run import check_new, locked, open_data, resolve_device

_FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """variants: the baselines and the models to compare with them, each trained with every seed.

    options: fields of TrainConfig that all runs share.
    """

    scale: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    options: dict

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds must be distinct numbers, got {list(self.seeds)}")

    def config(self, variant: Variant, seed: int, out: Path) -> TrainConfig:
        folder = Path(out) / "runs" / variant.name / f"seed-{seed}"
        chosen = variant.options(Baseline.of(self.scale))
        return TrainConfig(**self.options | chosen | {"seed": seed, "out": str(folder)})

    def members(self, out: Path) -> list[Member]:
        """Seed by seed, so that a sweep cut short has whole rows to compare."""
        return [
            Member(variant, self.config(variant, seed, out))
            for seed in self.seeds
            for variant in self.variants
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, out: Path) -> "Sweep":
        """The sweep in folder `out`; InputError if there is none."""
        path = Path(out) / _FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["variants"] = tuple(Variant(**variant) for variant in values["variants"])
            values["seeds"] = tuple(values["seeds"])
            values["options"]["data"] = tuple(values["options"]["data"])
            return cls(**values)
        except OSError as error:
            raise InputError(f"--resume: {out} holds no sweep: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a sweep: {error}") from error


def run_sweep(
    sweep: Sweep, out: Path, *, jobs: int = 1, resume: bool = False, console: Console | None = None
) -> tuple[dict, int | None]:
    """Train what is missing, then write the results; returns them and the signal that stopped it.

    Raises InputError, before anything is written, for members that cannot be: the first one's
    reason.
    """
    console = console or Console(quiet=True)
    out = Path(out)
    if not resume:
        check_new(out, _FILE, "sweep")
    _check_members(sweep, out)
    with locked(out):
        write_text(out / _FILE, sweep.to_json())
        members = sweep.members(out)
        console.print(
            f"{len(sweep.variants)} models x {len(sweep.seeds)} seeds, {jobs} at a time",
            highlight=False,
        )
        stopped = run_members(members, jobs, console)
        results = summarize(sweep, members)
        page = write_results(out, results)
    show(console, results, page)
    return results, stopped


def _check_members(sweep: Sweep, out: Path) -> None:
    """Each model can be built, and each seed's text is long enough; leaves the text tokenised."""
    resolve_device(sweep.options.get("device", "auto"))
    for seed in sweep.seeds:
        configs = {variant: sweep.config(variant, seed, out) for variant in sweep.variants}
        data, _ = open_data(next(iter(configs.values())), out)
        for variant, config in configs.items():
            try:
                config.model_config(data.vocab_size, data.separator)
            except InputError as error:
                raise InputError(f"{variant.name}: {error}") from error
