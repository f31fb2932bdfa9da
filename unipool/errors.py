# SPDX-License-Identifier: Apache-2.0
"""Errors whose message is one line meant for the person at the terminal."""


class InputError(ValueError):
    """An option, a file or a folder given by the user cannot be used."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class CommandInterrupted(Exception):  # noqa: N818  (no error of anybody's)
    """A command that Ctrl-C ended; the text says what became of its work."""


class TrainingError(RuntimeError):
    """A run had to stop: non-finite loss or gradient, or a checkpoint that could not be written."""
