# SPDX-License-Identifier: Apache-2.0
"""How the sources are kept: an op under one stem everywhere, functions and files of a readable
length."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import ROOT, python_files, tracked

LONGEST_FUNCTION = 60  # lines, without its docstring
LONGEST_TEST_FILE = 400

# Tables, in the form of a function.
TABLES = {
    "tests/ops/test_contract.py": {"raw_calls"},
    "softgpu/ptx/opcode.cpp": {"table"},
    "softgpu/runtime/devices.cpp": {"cudaDeviceGetAttribute"},
}
# An op's rooms. router_logits on CUDA is cuBLAS's product: no kernel, so no launcher.
STEMS = ("router", "router_logits", "dispatch", "grouped_mm", "grouped_wgrad", "expert_mlp")
ROOMS = (
    r"unipool/ops/{}\.py",
    r"csrc/ops/checks_{}\.cpp",
    r"csrc/cpu/{}\.cpp",
    r"csrc/cuda/{}_op\.cpp",
    r"csrc/cuda/{}(_bwd)?\.cuh?",
    r"csrc/include/unipool/{}\.h",
    r"tests/ops/test_{}\.py",
)
BESIDE = (  # modules on the op, and kernels without torch
    r"unipool/nn/{}\.py",
    r"tests/nn/test_{}_modules\.py",
    r"tests/softgpu/test_kernels_{}\.py",
    r"bench/results/.*",
)


def code_lines(function: ast.FunctionDef) -> int:
    documented = ast.get_docstring(function) is not None
    first = function.body[0].end_lineno if documented else function.lineno - 1
    return function.end_lineno - first


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and length of the functions that begin and end at one indentation of at most two."""
    lines = text.splitlines()
    other = "namespace|struct|class|enum|union|if|for|while|switch"
    begins = re.compile(rf"^( {{0,2}})(?!{other})[\w:~<].*\{{$")
    for first, line in enumerate(lines):
        found = begins.match(line)
        name = re.search(r"(\w+|operator\S+)\(", line) if found else None
        if name is None:
            continue
        for last in range(first + 1, len(lines)):
            if re.match(rf"^{found[1]}\}}", lines[last]):
                yield name[1], last - first + 1
                break


def too_long() -> Iterator[str]:
    for name, tree in python_files():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and code_lines(node) > LONGEST_FUNCTION:
                yield name, node.name, code_lines(node)
    for name in tracked():
        if name.endswith((".cpp", ".h", ".cu", ".cuh")):
            for function, length in cpp_functions((ROOT / name).read_text(encoding="utf-8")):
                if length > LONGEST_FUNCTION:
                    yield name, function, length


def test_functions_can_be_read_at_once():
    left = [row for row in too_long() if row[1] not in TABLES.get(row[0], ())]
    assert not left


def test_the_measure_of_functions_sees_a_long_one():
    body = "\n".join("  x += 1;" for _ in range(70))
    assert list(cpp_functions(f"int long_one(int x) {{\n{body}\n}}\n")) == [("long_one", 72)]
    python = "def f():\n    '''Doc.\n    '''\n" + "    x = 1\n" * 61
    assert code_lines(ast.parse(python).body[0]) == 61


def test_test_files_can_be_read_at_once():
    files = [name for name in tracked() if name.startswith("tests/")]
    sizes = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in files}
    assert not {name: size for name, size in sizes.items() if size > LONGEST_TEST_FILE}


@pytest.mark.parametrize("stem", STEMS)
def test_an_op_has_one_stem(stem):
    longer = [other for other in STEMS if other != stem and stem in other]
    named = [n for n in tracked() if stem in Path(n).name]
    named = [n for n in named if not any(other in Path(n).name for other in longer)]
    rooms = [pattern.format(stem) for pattern in (*ROOMS, *BESIDE)]
    assert not [name for name in named if not any(re.fullmatch(room, name) for room in rooms)]
    own = [room.format(stem) for room in ROOMS]
    empty = [room for room in own if not any(re.fullmatch(room, name) for name in named)]
    if stem == "router_logits":
        empty = [room for room in empty if "cuh?" not in room and "include" not in room]
    assert not empty
