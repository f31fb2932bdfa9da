# SPDX-License-Identifier: Apache-2.0
"""Model folders that bring code of their own, or name some elsewhere: none of it runs unasked."""

import io
import pickle
import sys

import pytest
import torch
from model_folders import change_json, write_model

pytest.importorskip("typer")
pytest.importorskip("transformers")

from unipool import cli
from unipool.model_folder import check_model_folder

pytestmark = pytest.mark.usefixtures("small_scale")


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Is there once code of the folder has run. Whoever asks on the terminal is told yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    return tmp_path / "code has run"


def plant(folder, marker, name="planted"):
    (folder / f"{name}.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "class Config:\n    pass\nModel = Tokenizer = Config\ndef generate(**kwargs):\n    pass\n"
    )


def commands(folder, tmp_path):
    """Every command that loads a model or a tokenizer from a folder."""
    text = tmp_path / "text.txt"
    text.write_text("some text to look at\n" * 200)
    (tmp_path / "sets").mkdir(exist_ok=True)
    (tmp_path / "sets" / "lambada_openai.jsonl").write_text('{"text": "one two three"}\n')
    data, out = f"--data={text}", tmp_path / "out"
    evaluate = ["--task=lambada_openai", f"--data={tmp_path / 'sets'}", "--device=cpu"]
    return {
        "generate": ["generate", str(folder), "--max-new-tokens=2", "--device=cpu"],
        "eval": ["eval", str(folder), *evaluate],
        "probe": ["probe", str(folder), data, "--device=cpu"],
        "analyze": ["analyze", str(folder), data, f"--out={out}", "--device=cpu"],
        "convert": ["convert", str(folder), str(out), "--to=private", "--untie"],
        "resize": ["resize", str(folder), str(out), "--experts=6"],
        "train": ["train", f"--tokenizer={folder}", data, f"--out={out}", "--steps=1"],
        "compare": ["compare", "--pools=1", f"--tokenizer={folder}", data, f"--out={out}"],
    }


COMMANDS = ["generate", "eval", "probe", "analyze", "convert", "resize", "train", "compare"]
TRUSTING = {"generate", "eval", "probe", "analyze"}


def one_error(capsys, command):
    assert cli.main(command) == 2, command
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


CONFIG_MAP = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
MAPS = {
    "own type": ("config.json", {"auto_map": CONFIG_MAP, "model_type": "planted"}),
    "known type": ("config.json", {"auto_map": CONFIG_MAP}),
    "elsewhere": ("config.json", {"auto_map": {"AutoConfig": "someone/repo--planted.Config"}}),
    "tokenizer": (
        "tokenizer_config.json",
        {
            "auto_map": {"AutoTokenizer": ["planted.Tokenizer", None]},
            "tokenizer_class": "PlantedTokenizer",
        },
    ),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_the_folder_never_runs_unasked(folder, marker, tmp_path, capsys, command, kind):
    plant(folder, marker)
    name, changes = MAPS[kind]
    change_json(folder / name, **changes)
    error = one_error(capsys, commands(folder, tmp_path)[command])
    assert f"brings code of its own (auto_map in {name}), which is not run" in error
    assert not marker.exists()


@pytest.mark.parametrize("command", sorted(TRUSTING))
def test_code_runs_where_the_option_says_so(folder, marker, tmp_path, command):
    plant(folder, marker)
    change_json(folder / "config.json", **MAPS["own type"][1])
    assert cli.main([*commands(folder, tmp_path)[command], "--trust-remote-code"]) == 2
    assert marker.exists(), "so the other tests could have seen it run"


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - TRUSTING))
def test_other_commands_have_no_such_option(folder, tmp_path, capsys, command):
    given = [*commands(folder, tmp_path)[command], "--trust-remote-code"]
    assert "No such option: --trust-remote-code" in one_error(capsys, given)


def test_a_file_of_options_cannot_trust(folder, tmp_path, capsys):
    (tmp_path / "options.json").write_text('{"trust-remote-code": true}')
    command = [*commands(folder, tmp_path)["generate"], f"--config={tmp_path / 'options.json'}"]
    assert "has an unknown option 'trust-remote-code'" in one_error(capsys, command)


@pytest.mark.parametrize("command", ["generate", "eval", "probe", "analyze"])
def test_a_generate_function_of_the_folder_is_code_too(folder, marker, tmp_path, capsys, command):
    (folder / "custom_generate").mkdir()
    plant(folder / "custom_generate", marker, "generate")
    error = one_error(capsys, commands(folder, tmp_path)[command])
    assert "custom_generate/generate.py" in error
    assert not marker.exists()


BAD = ["someone/kernel", "someone/kernel@main:attention", "paged|someone/kernel", "x", "", 3, ["a"]]
BAD += ["flash_attention_3", {"": "someone/kernel"}, {"text_config": "someone/kernel"}]


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_is_not_a_kernel_of_the_hub(folder, tmp_path, capsys, key, value):
    change_json(folder / "config.json", **{key: value})
    error = one_error(capsys, commands(folder, tmp_path)["generate"])
    assert f"{key} in {folder / 'config.json'} must be one of eager, sdpa, flex_attention" in error


def test_it_is_none_where_it_hides_in_a_part_either(folder, tmp_path, capsys):
    change_json(folder / "config.json", text_config={"parts": [{"attn_implementation": "a/b"}]})
    assert "got 'a/b'" in one_error(capsys, commands(folder, tmp_path)["convert"])
    change_json(folder / "config.json", text_config={}, experts_implementation="someone/kernel")
    assert "got 'someone/kernel'" in one_error(capsys, commands(folder, tmp_path)["convert"])


@pytest.mark.parametrize("value", [None, "sdpa", "eager", {"": "eager"}])
def test_what_comes_with_pytorch_is_taken(folder, value):
    change_json(folder / "config.json", attn_implementation=value, experts_implementation="eager")
    check_model_folder(folder)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_pickles_are_never_run(folder, marker, tmp_path, capsys):
    """As weights, beside them, named by the configuration, and as an optimizer."""
    for name in ("pytorch_model.bin", "optimizer.pt", "other.bin"):
        torch.save(Bomb(marker), folder / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "optimizer.pt", weights_only=True)
    error = one_error(capsys, commands(folder, tmp_path)["resize"])
    assert "optimizer.pt cannot be read as an optimizer's state" in error
    assert cli.main(commands(folder, tmp_path)["generate"]) == 0
    capsys.readouterr()
    change_json(folder / "config.json", transformers_weights="other.bin")
    for command in COMMANDS[:6]:
        error = one_error(capsys, commands(folder, tmp_path)[command])
        assert "must not name transformers_weights, got 'other.bin'" in error
    assert not marker.exists()
