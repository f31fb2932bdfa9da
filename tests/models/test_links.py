# SPDX-License-Identifier: Apache-2.0
"""What links and names in a model folder lead to: nothing outside is read as its part or copied."""

import json
import os
import shutil

import pytest
from model_folders import write_model

pytest.importorskip("typer")
pytest.importorskip("transformers")

from unipool import cli
from unipool.files import complete_folder, folder_fault
from unipool.models import folders

pytestmark = pytest.mark.usefixtures("small_scale")


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model")


def writers(folder, out):
    return {
        "convert": ["convert", str(folder), str(out), "--to=private", "--untie"],
        "resize": ["resize", str(folder), str(out), "--experts=6", "--add=init"],
    }


def one_error(capsys, command):
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", ["convert", "resize"])
@pytest.mark.parametrize("target", ["file", "folder", "relative", "nowhere", "twice"])
def test_a_link_that_leaves_the_folder_is_not_copied(folder, tmp_path, capsys, command, target):
    (tmp_path / "private").mkdir()
    secret = tmp_path / "private" / "secret"
    secret.write_text("secret")
    link = folder / "notes.txt"
    if target == "twice":
        (folder / ".inner").symlink_to(secret)
        link.symlink_to(folder / ".inner")
    else:
        places = {"file": secret, "folder": secret.parent, "nowhere": tmp_path / "nowhere"}
        link.symlink_to(places.get(target, "../private/secret"))
    out = tmp_path / "out"
    error = one_error(capsys, writers(folder, out)[command])
    assert "is a link that leaves its folder, to " in error
    assert not out.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_no_part_of_the_model_is_elsewhere_either(folder, tmp_path, capsys, name):
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    command = writers(folder, tmp_path / "out")["convert"]
    assert f"{folder / name} is a link that leaves" in one_error(capsys, command)
    assert cli.main(["generate", str(folder), "--max-new-tokens=1", "--device=cpu"]) == 0


@pytest.mark.parametrize("command", ["convert", "resize"])
def test_links_within_the_folder_are_copied_as_files(folder, tmp_path, command):
    (folder / "notes.txt").write_text("notes")
    (folder / "more.txt").symlink_to("notes.txt")
    out = tmp_path / "out"
    assert cli.main(writers(folder, out)[command]) == 0
    assert (out / "more.txt").read_text() == "notes"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_snapshot_in_the_cache_of_the_hub_is_whole(folder, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    out = tmp_path / "out"
    assert cli.main(writers(snapshot, out)["convert"]) == 0
    assert (out / "tokenizer.json").is_file()
    assert not (out / "tokenizer.json").is_symlink()


def test_a_blob_of_that_cache_that_leads_on_is_not(folder, tmp_path, capsys):
    (tmp_path / "secret").write_text("secret")
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (blobs / "0").symlink_to(tmp_path / "secret")
    (snapshot / "notes.txt").symlink_to("../../blobs/0")
    assert "leaves its folder" in one_error(capsys, writers(snapshot, tmp_path / "out")["convert"])


SHARDS = [
    ("../other/model.safetensors", "must name .safetensors files of its own folder"),
    ("{root}/other/model.safetensors", "must name .safetensors files of its own folder"),
    ("sub/model.safetensors", "must name .safetensors files of its own folder"),
    ("pytorch_model.bin", "must name .safetensors files of its own folder"),
    ("", "must name .safetensors files of its own folder"),
    (3, "must name .safetensors files of its own folder"),
    ("absent.safetensors", "lacks absent.safetensors, which model.safetensors.index.json names"),
]


@pytest.mark.parametrize(("name", "message"), SHARDS)
@pytest.mark.parametrize("command", ["generate", "convert", "resize", "probe"])
def test_a_shard_index_stays_in_its_folder(folder, tmp_path, capsys, command, name, message):
    other = tmp_path / "other"
    other.mkdir()
    weights = folder / "model.safetensors"
    shutil.copy(weights, other)
    shutil.copy(weights, folder / "pytorch_model.bin")
    name = name.format(root=tmp_path) if isinstance(name, str) else name
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "text").write_text("text to look at\n" * 99)
    commands = writers(folder, tmp_path / "out") | {
        "generate": ["generate", str(folder)],
        "probe": ["probe", str(folder), f"--data={tmp_path / 'text'}"],
    }
    assert message in one_error(capsys, commands[command])


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map_is_refused(folder, capsys, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "must map weights to files" in one_error(capsys, ["generate", str(folder)])


def test_a_folder_that_came_while_the_model_was_made_is_not_replaced(
    folder, tmp_path, capsys, monkeypatch
):
    out, usual = tmp_path / "out", folders.to_private

    def slow(*arguments, **options):
        with complete_folder(out) as staging:
            (staging / "name").write_text("of another process")
        return usual(*arguments, **options)

    monkeypatch.setattr(folders, "to_private", slow)
    assert "exists already" in one_error(capsys, writers(folder, out)["convert"])
    assert folder_fault(out) is None
    assert os.listdir(tmp_path / "out") != ["config.json"]
