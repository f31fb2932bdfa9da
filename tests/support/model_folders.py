# SPDX-License-Identifier: Apache-2.0
"""Model folders as Hugging Face has them, small, and changed."""

import json
from pathlib import Path

import torch

from unipool.data.tokenizer import ByteTokenizer
from unipool.models import UniPoolConfig, UniPoolForCausalLM
from unipool.models.presets import preset


def write_model(folder: Path, **options) -> Path:
    """A UniPool model of the bytes with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 32, "intermediate_size": 16}
    values = {"vocab_size": 320, "eos_token_id": 256, "initializer_range": 0.1} | sizes | options
    config = preset("tiny", **values)
    assert isinstance(config, UniPoolConfig)
    UniPoolForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().hugging_face().save_pretrained(folder)
    return folder


def change_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))
