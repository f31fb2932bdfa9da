# SPDX-License-Identifier: Apache-2.0
"""Cells and tables as text, and tables on a terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from unipool.terminal import printable


def with_spread(mean: float, std: float | None, form: str) -> str:
    """`mean ± std`, both in the format `form`, the spread without its sign; std None: the mean."""
    text = format(float(format(mean, form)) + 0.0, form)  # + 0.0: no minus before zero
    return text if std is None else f"{text} ± {format(std, form.lstrip('+'))}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def terminal(head: Sequence[str], left: Iterable[str] = ()) -> Table:
    """An empty table for rich's console; all but the columns in `left` are aligned to the right."""
    table, left = Table(box=box.SIMPLE, padding=(0, 1, 0, 0)), set(left)
    for name in head:
        table.add_column(Text(name), justify="left" if name in left else "right", no_wrap=True)
    return table


def add_row(table: Table, *cells: str) -> None:
    """Cells: text, which rich would take for markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells))
