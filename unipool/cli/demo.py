# SPDX-License-Identifier: Apache-2.0
"""`unipool demo`."""

from typing import Annotated

import typer

from unipool.cli.options import command
from unipool.configs import DemoConfig
from unipool.terminal import say, to_type


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
        options = ["--steps", config.steps] if config.steps else []
        options += ["--seed", config.seed] if config.seed else []
        again = to_type("demo", "--resume", "--out", config.out, *options)
        say(f"stopped; go on with: {again}")
        raise typer.Exit(128 + stop.signal) from None
