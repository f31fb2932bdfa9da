# SPDX-License-Identifier: Apache-2.0
"""What the tests of `unipool eval` run."""

import json
import math

import torch
from commands import refusal
from lm_eval.api.instance import Instance
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from unipool import cli
from unipool.data.tokenizer import ByteTokenizer
from unipool.models import UniPoolConfig, UniPoolForCausalLM, preset


def save(folder, model, tokenizer=None):
    model.eval().save_pretrained(folder)
    (tokenizer or ByteTokenizer().hugging_face()).save_pretrained(folder)
    return folder


def random_unipool(**options):
    torch.manual_seed(1)
    options = {"num_hidden_layers": 2, "num_experts": 6, "initializer_range": 0.1} | options
    options = {"vocab_size": 320, "num_experts_per_tok": 2} | options
    return UniPoolForCausalLM(preset("tiny", **options)).eval()


def train(root, *options):
    """A run of `unipool train`; its two steps leave the model next to random."""
    (root / "text.txt").write_text("the cold river under a green stone\n" * 300)
    arguments = ["train", "--out", str(root / "run"), "--data", str(root / "text.txt")]
    arguments += ["--d-model", "32", "--d-ff", "32", "--layers", "2", "--heads", "2", "--top-k"]
    arguments += ["2", "--pool-size", "4", "--init-std", "0.1", "--seq-len", "256", "--steps", "2"]
    arguments += ["--batch-size", "2", "--eval-tokens", "256", "--device", "cpu"]
    assert cli.main([*arguments, *options]) == 0
    return root / "run"


def evaluate(tmp_path, *arguments):
    """What `unipool eval` wrote with --json."""
    file = tmp_path / "made" / "scores.json"
    command = ["eval", *map(str, arguments), "--device", "cpu", "--json", str(file)]
    assert cli.main(command) == 0
    return json.loads(file.read_text())


def by_task(found):
    return {score["task"]: score for score in found["tasks"]}


def errors(capsys, *arguments, code=2):
    """The one line on stderr of an evaluation that must fail with `code`."""
    return refusal(capsys, "eval", *arguments, code=code)


def successor_model(kind, successors, otherwise, weight=8.0):
    """Logits that depend on the last byte only: `weight` for its successor, 0 for the others."""
    sizes = {"vocab_size": 320, "hidden_size": 320, "intermediate_size": 16, "eos_token_id": 256}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"rms_norm_eps": 1e-12, "max_position_embeddings": 512}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = UniPoolForCausalLM(UniPoolConfig(**sizes, num_experts=4, num_experts_per_tok=2))
    layer = model.model.layers[0]
    experts = layer.mlp if kind == "llama" else model.model.pools[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        (experts.down_proj.weight if kind == "llama" else experts.down_proj).zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(320))  # the norm makes 1 into sqrt(320)
        model.lm_head.weight.zero_()
        for last in range(320):
            following = ord(successors.get(chr(last), otherwise))
            model.lm_head.weight[following, last] = weight / math.sqrt(320)
    return model


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("made", i, 1))
        for i, pair in enumerate(arguments)
    ]
