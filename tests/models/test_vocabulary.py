# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that gives ids which the model has no embedding of is refused in one line."""

import pytest

pytest.importorskip("transformers")

from commands import refused_on_device
from model_folders import write_model

pytestmark = pytest.mark.any_device


@pytest.mark.parametrize("command", ["generate", "probe", "analyze"])
def test_larger_tokenizer(tmp_path, capsys, device, command):
    folder = write_model(tmp_path / "model", vocab_size=256, eos_token_id=255)
    (tmp_path / "text.txt").write_text("the cold river under a green stone\n" * 300)
    options = ["--data", tmp_path / "text.txt"] if command in ("probe", "analyze") else []
    said = refused_on_device(capsys, command, folder, *options)
    assert f"model: {folder} has a tokenizer with ids up to 256, and embeddings of the ids" in said
