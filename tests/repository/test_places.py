# SPDX-License-Identifier: Apache-2.0
"""Tests stand in the rooms of their subjects, a bare name is one file, and no file is named that is
gone."""

import re

from sources import ROOT, tracked

# Rooms of tests for what is beside the package.
BESIDE_THE_PACKAGE = {"bench", "softgpu", "repository"}
# Folders from which a test may import by a file's bare name: pyproject.toml, and its own.
BARE = re.compile(r"(bench|profiling|tests/\w+)/(\w+)\.py")

FOLDERS = ("bench", "csrc", "docs", "profiling", "softgpu", "tests", "unipool")
NAMED = re.compile(
    rf"(?<![\w/.<>-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|sh|md|cuh?|cpp|h|json|svg))\b"
)


def outside_of_rooms(names: list[str], rooms: set[str]) -> list[str]:
    """Those files below tests/ that stand in the wrong folder."""
    wrong = []
    for name in names:
        folder, _, file = name.rpartition("/")
        is_test = file.startswith("test_")
        if not is_test and (folder in {"support", "softgpu"} or file == "conftest.py"):
            continue
        if not is_test or folder not in rooms:
            wrong.append(name)
    return wrong


def test_tests_stand_in_the_room_of_their_subject():
    packages = {n.split("/")[1] for n in tracked() if re.fullmatch(r"unipool/\w+/.*\.py", n)}
    below = [n.removeprefix("tests/") for n in tracked() if n.startswith("tests/")]
    tests = [name for name in below if name.endswith(".py")]
    assert not outside_of_rooms(tests, packages | BESIDE_THE_PACKAGE)


def test_the_look_for_tests_outside_of_rooms_finds_them():
    right = ["nn/test_a.py", "nn/conftest.py", "conftest.py", "support/a.py"]
    wrong = ["test_a.py", "other/test_a.py", "support/test_a.py", "nn/a.py", "a.py"]
    assert outside_of_rooms(right + wrong, {"nn"}) == wrong


def test_a_bare_name_is_one_file():
    """Tests import what they share by its bare name, and pytest imports them so."""
    paths = {}
    for name in tracked():
        if (found := BARE.fullmatch(name)) and found[2] != "conftest":
            paths.setdefault(found[2], []).append(name)
    assert not [same for same in paths.values() if len(same) > 1]


def test_no_test_file_is_imported():
    """What two of them need is a file of its own."""
    imported = re.compile(r"^ *(?:from|import) test_\w+", re.MULTILINE)
    files = [n for n in tracked() if n.startswith("tests/") and n.endswith(".py")]
    found = {name: imported.findall((ROOT / name).read_text(encoding="utf-8")) for name in files}
    assert not {name: lines for name, lines in found.items() if lines}


def test_files_that_sources_name_exist():
    """In comments, strings and recipes, from the root of the project."""
    missing = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        missing += [f"{name}: {path}" for path in NAMED.findall(text) if not is_there(path)]
    assert not missing


def is_there(path: str) -> bool:
    return any((folder / path).exists() for folder in (ROOT, ROOT / "csrc" / "include"))


def test_the_look_for_files_that_are_named_finds_them():
    tests = "tests"  # apart, lest this file names what is not there
    text = f"see {tests}/test_a.py, `{tests}/nn/a.cu`; unipool/router.h, build/docs/a.md, a/b.py"
    named = NAMED.findall(text)
    assert named == [f"{tests}/test_a.py", f"{tests}/nn/a.cu", "unipool/router.h"]
    assert [is_there(path) for path in named] == [False, False, True]
