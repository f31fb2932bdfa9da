# SPDX-License-Identifier: Apache-2.0
"""`unipool demo`."""

from typing import Annotated

import typer

from unipool.cli.options import command
from unipool.configs import DemoConfig
from unipool.terminal import say


@command(DemoConfig)
def demo(
    given: dict,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted demo")
    ] = False,
) -> None:
    """Train three small models, layer-private and shared-pool, and compare them."""
    config = DemoConfig(**given)

    from rich.console import Console

    from unipool.training.demo import DemoInterruptedError, run_demo

    try:
        run_demo(config, resume=resume, console=Console())
    except DemoInterruptedError as stop:
        options = f" --steps {config.steps}" if config.steps else ""
        options += f" --seed {config.seed}" if config.seed else ""
        say(f"stopped; go on with: unipool demo --resume --out {config.out}{options}")
        raise typer.Exit(128 + stop.signal) from None
