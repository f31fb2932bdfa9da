# SPDX-License-Identifier: Apache-2.0
"""`unipool doctor`."""

import typer

from unipool import doctor as library


def doctor() -> None:
    """Say what is installed, test each op, and give the fix for what is wrong."""
    raise typer.Exit(library.main([]))  # here for --help; `main` goes without typer
