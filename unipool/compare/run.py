# SPDX-License-Identifier: Apache-2.0
"""Train the runs of a sweep, and write what came of them."""

from pathlib import Path

from rich.console import Console

from unipool.compare.members import run_members
from unipool.compare.report import show, write_results
from unipool.compare.summary import summarize
from unipool.compare.sweep import SWEEP_FILE, Sweep
from unipool.configs import CompareConfig
from unipool.errors import InputError
from unipool.files import write_text
from unipool.models.loading import resolve_device
from unipool.terminal import say
from unipool.training.run import check_new, check_trainable, locked, open_data


def run_compare(
    config: CompareConfig, *, resume: bool = False, console: Console | None = None
) -> tuple[dict, int | None]:
    """As run_sweep, on the sweep that `config` describes; `resume`: on the one in its folder."""
    sweep = Sweep.load(config.out) if resume else Sweep.of(config)
    return run_sweep(sweep, config.out, jobs=config.jobs, resume=resume, console=console)


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
        check_new(out, SWEEP_FILE, "sweep")
    _check_members(sweep, out)
    with locked(out):
        if not resume:
            check_new(out, SWEEP_FILE, "sweep")  # again: another one may have begun here since
        write_text(out / SWEEP_FILE, sweep.to_json())
        members = sweep.members(out)
        say(f"{len(sweep.variants)} models x {len(sweep.seeds)} seeds, {jobs} at a time", console)
        stopped = run_members(members, jobs, console)
        results = summarize(sweep, members)
        page = write_results(out, results)
    show(console, results, page)
    return results, stopped


def _check_members(sweep: Sweep, out: Path) -> None:
    """Each model can be built, and each seed's text is long enough; leaves the text tokenised."""
    device = resolve_device(sweep.options.get("device", "auto"))
    for seed in sweep.seeds:
        configs = {variant: sweep.config(variant, seed, out) for variant in sweep.variants}
        data, _ = open_data(next(iter(configs.values())), out)
        for variant, config in configs.items():
            try:
                model_config = config.model_config(data.vocab_size, data.separator)
                check_trainable(config, model_config, device)
            except InputError as error:
                raise InputError(f"{variant.name}: {error}") from error
