# SPDX-License-Identifier: Apache-2.0
"""What is shown to people. Names, paths and texts come from anywhere, and a terminal acts on some
characters: it moves the cursor, changes the title, turns the direction of a line. `say` prints all
that did not come from us, and pages take their texts through `printable`."""

import os
import shlex
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_HARMFUL = {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"}
_JOINERS = "\u00ad\u200c\u200d"  # of Cf, and parts of ordinary words


def printable(text: object, lines: bool = False) -> str:
    r"""str(text) with each character that a terminal acts on, or cannot show, as an escape: \x1b.

    lines: line ends and tabs stay. A byte of a path that is not UTF-8 is shown as \xff.
    """
    text = str(text)
    return text if text.isprintable() else "".join(_shown(c, lines) for c in text)


def _shown(character: str, lines: bool) -> str:
    if unicodedata.category(character) not in _HARMFUL or character in _JOINERS:
        return character
    if lines and character in "\n\t":
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds the bytes 0x80 to 0xff of such a path
        code -= 0xDC00
    if code < 0x100:
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def to_type(*words: object) -> str:
    """The line to type for `unipool WORDS` where this process was started: by its path where
    `unipool` alone would not be found, or would be another."""
    run, found = sys.argv[0] if sys.argv else "", shutil.which("unipool")
    if Path(run).name == "unipool" and os.path.exists(run):
        program = ["unipool"] if found and os.path.samefile(found, run) else [run]
    else:
        program = ["unipool"] if found else [sys.executable, "-m", "unipool.cli"]
    return shlex.join([*program, *map(str, words)])


def say(
    text: object, console: "Console | None" = None, *, title: str = "", lines: bool = False
) -> None:
    """Print `text` as it is, in one line unless `lines`; without markup, colours or wrapping.

    console: of rich; None prints to the standard output. title: what stands before it, in bold.
    """
    if console is None:
        print(printable(title + str(text), lines))
        return
    from rich.text import Text

    shown = Text.assemble((printable(title), "bold"), printable(text, lines))
    console.print(shown, soft_wrap=True)
