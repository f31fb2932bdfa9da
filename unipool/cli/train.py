# SPDX-License-Identifier: Apache-2.0
"""`unipool train`."""

from pathlib import Path
from typing import Annotated

import typer

from unipool.cli.options import command
from unipool.errors import InputError
from unipool.terminal import say, to_type
from unipool.training.config import TrainConfig


@command(TrainConfig)
def train(
    given: dict,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on from the last complete checkpoint in --out",
            rich_help_panel="Run",
        ),
    ] = False,
) -> None:
    """Train a language model into a run folder."""
    out = given.get("out", TrainConfig.out)
    if resume:
        if not Path(out, "config.json").is_file():
            raise InputError(f"--resume: {out} holds no run")
        config = TrainConfig.load(Path(out, "config.json")).resumed_with(given | {"out": out})
    else:
        config = TrainConfig(**given)

    from rich.console import Console

    from unipool.training.run import run_training

    console = Console()
    result = run_training(config, resume=resume, console=console)
    if result.validation is None:
        again = to_type("train", "--resume", "--out", out)
        say(f"stopped after step {result.step}; go on with: {again}", console)
        raise typer.Exit(128 + result.signal)
    say(f"model: {Path(out, 'model')}", console)
