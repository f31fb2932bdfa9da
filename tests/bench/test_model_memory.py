# SPDX-License-Identifier: Apache-2.0
"""The memory formulas of docs/choosing.md against what autograd saves and what AdamW keeps."""

from pathlib import Path

import pytest
import torch

from unipool.models import UniPoolForCausalLM, preset

ROOT = Path(__file__).resolve().parents[2]
import model_memory  # noqa: E402

CONFIGS = {
    "tiny": {},
    "three experts per token, wide ones": {
        "num_experts_per_tok": 3,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
    },
    "a pool per layer, more heads, a large vocabulary": {
        "num_pools": 4,
        "num_experts": 5,
        "router": "softmax",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 96,
        "vocab_size": 1000,
    },
}


def saved_bytes(config, precision: str, batch: int) -> int:
    """Of the storages that one forward pass keeps for its backward."""
    torch.manual_seed(0)
    model = UniPoolForCausalLM(config)
    kept = {}  # address -> storage, which stays alive so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(config.vocab_size, (batch, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", model_memory.PRECISIONS)
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_activations_per_token(overrides, precision):
    """Weights and their copies are saved, too, and are the same for both sizes of the batch."""
    config = preset("tiny", **overrides)
    few, many = (saved_bytes(config, precision, batch) for batch in (4, 8))
    per_token = (many - few) / (4 * 64)
    assert per_token == pytest.approx(model_memory.activation_bytes(config, precision), rel=0.01)


def test_state_is_that_of_adamw():
    config = preset("tiny")
    model = UniPoolForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(config.vocab_size, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
    kept += [tensor for p in model.parameters() for tensor in (p, p.grad)]
    total = sum(tensor.nbytes for tensor in kept if tensor.dim() > 0)  # not the step counts
    scalars = sum(p.numel() for p in model.parameters() if p.dim() == 0)  # the routers' scales
    counted = model_memory.state_bytes(config, "fp32") - 16 * scalars
    assert total == counted


def test_tables_name_every_scale():
    tables = model_memory.choosing({"results": []})
    for scale in model_memory.SCALES:
        assert f"| {scale} |" in tables["sizes"]
        assert f"| {scale} |" in tables["memory"]
