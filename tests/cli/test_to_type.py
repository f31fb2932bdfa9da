# SPDX-License-Identifier: Apache-2.0
"""A command that a message names can be typed where the process was started."""

import sys

import pytest

from unipool.terminal import to_type

pytestmark = pytest.mark.any_device


@pytest.fixture
def program(tmp_path, monkeypatch):
    """An executable `unipool` in a folder of its own, run by its path; PATH is empty."""
    path = tmp_path / "bin" / "unipool"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(path), "train"])
    monkeypatch.setenv("PATH", "")
    return path


def test_its_path_where_it_is_not_found(program):
    assert to_type("train", "--out", "my run") == f"{program} train --out 'my run'"


def test_its_name_where_it_is(program, monkeypatch):
    monkeypatch.setenv("PATH", str(program.parent))
    assert to_type("train", "--steps", 3) == "unipool train --steps 3"


def test_its_path_where_another_is_found(program, tmp_path, monkeypatch):
    other = tmp_path / "unipool"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert to_type("demo") == f"{program} demo"


def test_a_module_by_its_python(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert to_type("demo") == f"{sys.executable} -m unipool.cli demo"
