# SPDX-License-Identifier: Apache-2.0
"""Cells and tables as text."""

from collections.abc import Iterable, Sequence


def with_spread(mean: float, std: float | None, form: str) -> str:
    """`mean ± std`, both in the format `form`, the spread without its sign; std None: the mean."""
    text = format(float(format(mean, form)) + 0.0, form)  # + 0.0: no minus before zero
    return text if std is None else f"{text} ± {format(std, form.lstrip('+'))}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
