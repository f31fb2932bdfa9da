# SPDX-License-Identifier: Apache-2.0
"""Nothing private is used, or replaced in a test, from another file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import python_files, tracked

# What transformers and lm-eval let others override.
THEIRS = {"_save_checkpoint", "_load_rng_state", "_load_from_checkpoint", "_model_call"}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, by Python's documentation
PRIVATE_MODULES = {"_C", "_library"}  # private to users, not to the project

REPLACING = {"setattr", "delattr", "patch", "object"}


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
