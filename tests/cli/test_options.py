# SPDX-License-Identifier: Apache-2.0
"""Options stand once: the command line, configuration files and library callers agree on them."""

import builtins
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from commands import refusal

from unipool import cli, configs
from unipool.cli.options import command
from unipool.errors import InputError
from unipool.options import Option, check_options, known_options, nearest, read_options
from unipool.training.config import TrainConfig


@dataclass(frozen=True)
class Config:
    """One field of each kind."""

    source: Annotated[Path, Option("a folder", argument=True)]
    kind: Annotated[Literal["round", "square"], Option("which")] = "round"
    count: Annotated[int, Option("how many", "Numbers", min=1, max=9)] = 3
    rate: Annotated[float | None, Option("how fast [as it likes]", "Numbers", above=0)] = None
    part: Annotated[float, Option("how much", min=0, below=1)] = 0.5
    seed: Annotated[int, Option("of chance", min=0, below=1 << 32)] = 0
    loud: Annotated[bool, Option("with noise")] = False
    text: Annotated[str | None, Option("to say")] = None
    paths: Annotated[tuple[str, ...], Option("to read", path="read")] = ()
    sizes: Annotated[tuple[int, ...], Option("each", commas=True)] = (1, 2)

    def __post_init__(self):
        check_options(self)


def run(arguments: list[str], into: list) -> None:
    @command(Config)
    def collect(given: dict, again: Annotated[bool, typer.Option("--again")] = False) -> None:
        into.append((given, again))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(collect)
    app(args=arguments, standalone_mode=False)


def given(*arguments: str) -> dict:
    found: list = []
    run(list(arguments), found)
    return found[0][0]


def test_the_command_line_gives_the_types_of_the_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert given("here") == {"source": Path("here")}
    options = ["--kind=square", "--count=4", "--rate=2", "--loud", "--text=3", "--sizes=5, 6"]
    found = given("here", *options, "--paths=a", "--paths=b")
    assert found == {
        "source": Path("here"),
        "kind": "square",
        "count": 4,
        "rate": 2.0,
        "loud": True,
        "text": "3",
        "paths": (str(tmp_path / "a"), str(tmp_path / "b")),
        "sizes": (5, 6),
    }
    assert Config(**found).seed == 0


def test_a_commands_own_options_stay_apart():
    found: list = []
    run(["here", "--again"], found)
    assert found == [({"source": Path("here")}, True)]


FILES = {
    "a.json": '{"source": "s", "count": 5, "rate": 1, "paths": ["p"], "sizes": [7, 8], '
    '"text": null}',
    "a.yaml": "source: s\ncount: 5\nrate: 1e0\npaths: [p]\nsizes: 7,8\ntext: null\n",
    "a.yml": "source: s\ncount: '5'\nrate: 1\npaths: p\nsizes:\n- 7\n- 8\ntext: ~\n",
    "a.toml": 'source = "s"\ncount = 5\nrate = 1.0\npaths = ["p"]\nsizes = [7, 8]\n',
}


@pytest.mark.parametrize("name", FILES)
def test_files_hold_the_same_options(tmp_path, monkeypatch, name):
    if name.endswith("toml") and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name])
    found = read_options(Path(name), Config)
    due = {"source": Path("s"), "count": 5, "rate": 1.0, "paths": ("p",), "sizes": (7, 8)}
    assert found == due | ({} if name.endswith("toml") else {"text": None})
    assert type(found["rate"]) is float
    assert Config(**found) == Config(**due)
    # Flags come first, and what is read is found again from anywhere.
    merged = given("--config", name, "--count", "6", "other")
    assert (merged["source"], merged["count"]) == (Path("other"), 6)
    assert (merged["rate"], merged["paths"]) == (1.0, (str(tmp_path / "p"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"cuont": 1}', "a.json has an unknown option 'cuont'; did you mean count?"),
        ("a.json", '{"zzz": 1}', "a.json has an unknown option 'zzz'"),
        ("a.json", '{"count": "many"}', "a.json: --count must be a whole number, got 'many'"),
        ("a.json", '{"count": 1.5}', "a.json: --count must be a whole number, got 1.5"),
        ("a.json", '{"count": true}', "a.json: --count must be a whole number, got True"),
        ("a.json", '{"loud": 1}', "a.json: --loud must be true or false, got 1"),
        ("a.json", '{"sizes": "1,b"}', "--sizes must be numbers with commas between, got '1,b'"),
        ("a.json", '{"source": 1}', "a.json: source must be a path, got 1"),
        ("a.json", "[1]", "a.json must hold options by name, got list"),
        ("a.json", "{", "a.json is not JSON: "),
        ("a.yaml", "a: [", "a.yaml is not YAML: "),
        ("a.toml", "a = ", "a.toml is not TOML: "),
        ("a.ini", "", "a.ini must end in .json, .yaml, .yml, .toml"),
    ],
)
def test_files_that_cannot_be_taken(tmp_path, monkeypatch, name, content, message):
    if name.endswith("toml") and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    with pytest.raises(InputError) as failure:
        read_options(Path(name), Config)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*no.json: No such file"):
        read_options(tmp_path / "no.json", Config)


def test_toml_without_a_reader(tmp_path, monkeypatch):
    def without(name, *rest, usual=builtins.__import__):
        if name in ("tomllib", "tomli"):
            raise ImportError(name)
        return usual(name, *rest)

    (tmp_path / "a.toml").write_text("")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"TOML needs Python 3.11, or tomli"):
        read_options(tmp_path / "a.toml", Config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "oval"}, "--kind must be one of round, square, got oval"),
        ({"count": 0}, "--count must be in [1, 9], got 0"),
        ({"count": 1.0}, "--count must be a whole number, got 1.0"),
        ({"count": True}, "--count must be a whole number, got True"),
        ({"count": None}, "--count must be a whole number, got None"),
        ({"rate": 0.0}, "--rate must be a positive number, got 0.0"),
        ({"rate": float("inf")}, "--rate must be a positive number, got inf"),
        ({"part": 1}, "--part must be in [0, 1), got 1"),
        ({"seed": 1 << 32}, "--seed must be in [0, 2**32), got 4294967296"),
        ({"text": 3}, "--text must be a text, got 3"),
        ({"paths": None}, "--paths must be a text, got None"),
        ({"sizes": (1, "b")}, "--sizes must be a whole number, got b"),
    ],
)
def test_library_callers_hear_the_same(values, message):
    with pytest.raises(InputError) as failure:
        Config(Path("x"), **values)
    assert str(failure.value) == message


def test_nothing_in_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("paths:\ntext:\n")
    assert read_options(tmp_path / "a.yaml", Config) == {"paths": (), "text": None}
    (tmp_path / "a.yaml").write_text("")
    assert read_options(tmp_path / "a.yaml", Config) == {}


def test_what_is_missing():
    with pytest.raises(InputError, match="Missing argument 'source'"):
        given("--count", "3")


def test_nearest():
    assert nearest("stpes", ["seed", "steps"]) == "; did you mean steps?"
    assert nearest("zzz", ["seed", "steps"]) == ""


COMMANDS = {"train": TrainConfig} | {
    name.removesuffix("Config").lower(): config
    for name, config in vars(configs).items()
    if name.endswith("Config")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_all_its_options(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([name, "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())  # lines may break within a word
    for field in known_options(COMMANDS[name]).values():
        assert field.flag in text
        assert "".join(field.option.help.split()) in text
        if field.default and isinstance(field.default, int | float | str):
            said = f"[default:{field.default}]" in text
            assert said != field.option.help.endswith("]"), "in words or as a value"
    assert "--config" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_in_their_ranges(name):
    needed = {
        entry.name: Path("x") if entry.type is not int else 1
        for entry in dataclasses.fields(COMMANDS[name])
        if entry.default is dataclasses.MISSING
    }
    samples = {"to": "shared", "experts": 4}
    config = COMMANDS[name](**needed | {k: v for k, v in samples.items() if k in needed})
    check_options(config)


def test_a_runs_config_is_a_config_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data=("/no/such/file",), steps=5, lr=1e-3, min_lr=1e-5)
    Path("config.json").write_text(config.to_json())
    assert read_options(Path("config.json"), TrainConfig) == dataclasses.asdict(config)
    assert json.loads(config.to_json())["lr"] == 1e-3
    given = ["train", "--config", "config.json"]
    assert "data: /no/such/file does not exist" in refusal(capsys, *given)
    assert "--steps must be >= 1, got 0" in refusal(capsys, *given, "--steps", "0")


def test_an_unknown_option_names_the_nearest(capsys):
    said = refusal(capsys, "train", "--stpes", "3")
    assert "No such option: --stpes; did you mean --steps? (see --help)" in said
