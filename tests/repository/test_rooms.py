# SPDX-License-Identifier: Apache-2.0
"""Who imports whom in the package: files without circles, rooms in one direction."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "unipool"

# A room is a folder of the package, or a file beside the folders. Each may import from these.
PLAIN = {"errors", "files"}
ROOMS = {
    "__init__": {"nn", "ops"},
    "_library": set(),
    "ops": {"_library"},
    "nn": {"ops"},
    "reference": {"ops"},
    "doctor": {"__init__", "_library", "ops", "options", "reference", "terminal"},
    "integrations": {"ops"},
    "scales": {"errors"},
    "errors": set(),
    "terminal": set(),
    "files": set(),
    "options": {"errors", "json_files"},
    "configs": {"errors", "options"},
    "json_files": {"errors"},
    "schema": {"errors", "json_files"},
    "model_folder": {"errors", "json_files"},
    "checkpoints": {"model_folder", *PLAIN},
    "data": {"json_files", "model_folder", *PLAIN},
    "report": {"terminal", *PLAIN},
    "models": {
        *("checkpoints", "configs", "data", "json_files", "model_folder", "nn", "ops", "scales"),
        *("schema", *PLAIN),
    },
    "training": {
        *("__init__", "configs", "data", "json_files", "model_folder", "models", "options"),
        *("report", "scales", "schema", "terminal", *PLAIN),
    },
    "evaluation": {
        *("checkpoints", "configs", "data", "errors", "json_files", "models", "report"),
        "training",
    },
    "analysis": {
        *("__init__", "checkpoints", "configs", "data", "models", "nn", "ops", "report"),
        *("training", *PLAIN),
    },
    "compare": {
        *("__init__", "configs", "data", "models", "nn", "options", "report", "scales", "schema"),
        *("terminal", "training", *PLAIN),
    },
    "cli": {
        *("__init__", "analysis", "checkpoints", "compare", "configs", "doctor", "errors"),
        *("evaluation", "models", "options", "report", "terminal", "training"),
    },
}

# What is no training of its own takes from `training` only what a run was told and has written.
TRAINERS = {"training", "compare", "cli"}
OF_A_RUN = {f"unipool.training.{name}" for name in ("config", "metrics", "resuming", "run")}


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by module name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, root: str) -> Iterator[str]:
    """The modules of the package that a file names in an import, wherever that stands in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == root)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            if base.split(".")[0] == root:
                yield from (f"{base}.{alias.name}" for alias in node.names)


def graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports; a name that is none is in its parent's
    file."""
    known = modules(package)
    edges = {}
    for name, path in known.items():
        named = set(imports(name, path, package.name))
        edges[name] = {n if n in known else n.rpartition(".")[0] for n in named} - {name}
    return edges


def room(module: str) -> str:
    return (*module.split("."), "__init__")[1]


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return None


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return graph(PACKAGE)


def test_no_circle_between_files(edges):
    assert circle(edges) is None


def test_rooms_import_in_one_direction(edges):
    strangers = {
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if room(other) not in ROOMS[room(module)] | {room(module)}
    }
    assert not strangers
    assert circle(ROOMS) is None


def test_the_table_has_no_more_than_is_used(edges):
    used = {name: set() for name in ROOMS}
    for module, others in edges.items():
        used[room(module)] |= {room(other) for other in others} - {room(module)}
    assert {name: rooms - used[name] for name, rooms in ROOMS.items()} == {
        name: set() for name in ROOMS
    }


def test_what_others_take_from_training(edges):
    taken = {
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if room(other) == "training" and room(module) not in TRAINERS and other not in OF_A_RUN
    }
    assert not taken


@pytest.mark.parametrize(
    "line",
    [
        "import package.b",
        "from package import b",
        "from . import b",
        "from .b import name",
        "from package.b import name",
        "if TYPE_CHECKING:\n    from package.b import name",
        "def late():\n    from package.b import name",
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, line):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(line + "\n")
    (package / "b.py").write_text("from package.a import name\n")
    assert set(circle(graph(package))) == {"package.a", "package.b"}
