# SPDX-License-Identifier: Apache-2.0
"""How the sources are kept: an op under one stem everywhere, functions and files of a readable
length, nothing private used from outside."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FUNCTION = 60  # lines, without its docstring
LONGEST_TEST_FILE = 400

# Tables, in the form of a function.
TABLES = {
    "tests/ops/test_contract.py": {"raw_calls"},
    "softgpu/ptx/opcode.cpp": {"table"},
    "softgpu/runtime/devices.cpp": {"cudaDeviceGetAttribute"},
}
# What transformers and lm-eval let others override.
THEIRS = {"_save_checkpoint", "_load_rng_state", "_load_from_checkpoint", "_model_call"}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, by Python's documentation
PRIVATE_MODULES = {"_C", "_library"}  # private to users, not to the project

REPLACING = {"setattr", "delattr", "patch", "object"}

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


@cache
def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not a checkout")
    return [name for name in found.stdout.split("\n") if name and (ROOT / name).is_file()]


def python_files() -> Iterator[tuple[str, ast.Module]]:
    for name in tracked():
        if name.endswith(".py"):
            yield name, ast.parse((ROOT / name).read_text(encoding="utf-8"))


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


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PRIVATE_MODULES


def own_modules() -> set[str]:
    """What the project's files are called in an import."""
    return {"unipool", "softgpu", *(Path(n).stem for n in tracked() if n.endswith(".py"))}


def bound_modules(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Names in a file that may stand for a module of the project."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                if first in own:
                    yield alias.asname or first
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in own:
            yield from (alias.asname or alias.name for alias in node.names)


def replaced_names(call: ast.Call) -> Iterator[str]:
    """Private names that setattr, delattr or patch is given, as "name" or "a.b.name"."""
    function = call.func
    if getattr(function, "attr", getattr(function, "id", "")) in REPLACING:
        named = [a.value for a in call.args[:2] if isinstance(a, ast.Constant)]
        last = [str(name).split(".")[-1] for name in named]
        yield from (name for name in last if is_private(name) and name not in THEIRS)


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of other files: imported, read from a module of the project, or replaced."""
    modules = set(bound_modules(tree, own))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call):
            yield from replaced_names(node)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            chain = ast.unparse(node.value).split(".")
            if chain[0] in modules and node.attr not in {*THEIRS, *OF_NAMED_TUPLES}:
                yield node.attr


def assigned_from_outside(tree: ast.Module) -> Iterator[str]:
    """Private attributes that are set on anything but `self`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
            continue
        if is_private(node.attr) and ast.unparse(node.value) not in {"self", "cls"}:
            yield node.attr


def test_nothing_private_is_used_from_outside():
    own = own_modules()
    found = {name: sorted(private_uses(tree, own)) for name, tree in python_files()}
    for name, tree in python_files():
        if name.startswith("tests/"):
            found[name] += assigned_from_outside(tree)
    assert not {name: uses for name, uses in found.items() if uses}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from a import _b", ["_b"]),
        ("m.setattr(files, '_sync', f)", ["_sync"]),
        ("m.setattr('a.b._c', f)", ["_c"]),
        ("setattr(files, '_sync', f)", ["_sync"]),
        ("patch.object(files, '_sync')", ["_sync"]),
        ("import unipool.files\nunipool.files._sync()", ["_sync"]),
        ("from unipool import files\nfiles._sync()", ["_sync"]),
        ("from unipool import files as f\nf._sync()", ["_sync"]),
        ("from unipool.trainer import Trainer\nTrainer._step(1)", ["_step"]),
        ("import harness\nharness._CACHE.clear()", ["_CACHE"]),
        ("import torch\ntorch._dynamo.reset()", []),
        ("from unipool import _C, ops\n_C.build_info(), ops.Routing._fields", []),
        ("m.get('_d')", []),
    ],
)
def test_the_look_for_private_names_finds_them(source, found):
    assert sorted(private_uses(ast.parse(source), {"unipool", "harness"})) == found


def test_the_look_for_private_names_finds_assignments():
    source = "self._a = thing._b\nthing._c = 1\nthing._d += 1\ndel thing._e\nthing.f = 1"
    assert sorted(assigned_from_outside(ast.parse(source))) == ["_c", "_d", "_e"]


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
