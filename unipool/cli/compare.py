# SPDX-License-Identifier: Apache-2.0
"""`unipool compare`."""

from typing import Annotated

import typer

from unipool.cli.options import command
from unipool.configs import CompareConfig
from unipool.errors import InputError, TrainingError
from unipool.options import known_options
from unipool.terminal import say, to_type


@command(CompareConfig)
def compare(
    given: dict,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on with the sweep in --out: what is missing or failed",
            rich_help_panel="Sweep",
        ),
    ] = False,
) -> None:
    """Train a grid of models with several seeds, and compare them with the layer-private one.

    Options of a grid, and seeds, take several values with commas between.
    """
    if resume and (left := sorted(set(given) - {"out", "jobs"})):
        flag = known_options(CompareConfig)[left[0]].flag
        raise InputError(f"--resume takes the sweep in --out as it is: leave out {flag}")
    config = CompareConfig(**given)

    from rich.console import Console

    from unipool.compare.run import run_compare

    console = Console()
    results, stopped = run_compare(config, resume=resume, console=console)
    if stopped is not None:
        again = to_type("compare", "--resume", "--out", config.out)
        say(f"stopped; go on with: {again}", console)
        raise typer.Exit(128 + stopped)
    runs = [run for entry in results["variants"] for run in entry["runs"]]
    if failed := sum(run["status"] == "failed" for run in runs):
        raise TrainingError(f"{failed} of {len(runs)} runs failed; try them again with --resume")
