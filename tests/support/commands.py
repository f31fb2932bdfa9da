# SPDX-License-Identifier: Apache-2.0
"""Commands of `unipool` in this process: what a user reads, and nothing else."""

import devices
import pytest

from unipool import cli


def output(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What a command that succeeds writes to stdout."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refusal(capsys: pytest.CaptureFixture, *arguments: object, code: int = 2) -> str:
    """The one line on stderr of a command that must end with `code`."""
    capsys.readouterr()
    ended = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert ended == code, captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


def on_device(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """`output` of a command on the test's device."""
    return output(capsys, *arguments, "--device", devices.current().type)


def refused_on_device(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    return refusal(capsys, *arguments, "--device", devices.current().type)
