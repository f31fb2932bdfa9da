# SPDX-License-Identifier: Apache-2.0
"""Errors whose message is one line meant for the person at the terminal."""


class InputError(ValueError):
    """An option, a file or a folder given by the user cannot be used."""


class TrainingError(RuntimeError):
    """A run had to stop: non-finite loss or gradient, or a checkpoint that could not be written."""
