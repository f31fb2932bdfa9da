# SPDX-License-Identifier: Apache-2.0
"""A run of `unipool train`: losses, schedule, evaluation, generation."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import flip
from runs import rows
from torch.nn import functional as F

from unipool.data.tokens import ValBlocks
from unipool.errors import InputError
from unipool.models.generation import generate_text
from unipool.models.loading import load_model
from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer
from unipool.training.validation import validate

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


TORCH_SEES_CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("seed", [0, 3])
def test_losses_are_those_of_the_model_and_of_the_text(config, seed):
    """The logged language loss is the cross-entropy of the very sequences that the order names."""
    from transformers import AutoModelForCausalLM, set_seed

    config = replace(config, steps=1, log_every=1, seed=seed)
    result = run_training(config)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config.model_config(result.data.vocab_size, 256))
    from unipool.data.tokens import TrainBlocks

    blocks = TrainBlocks(result.data.train, config.seq_len, seed, 4)
    ids = torch.stack([blocks[i]["input_ids"] for i in range(4)])
    logits = model(input_ids=ids).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    row = rows(config)[0]
    assert row["lm_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["loss"] == pytest.approx(row["lm_loss"] + row["aux_loss"], rel=1e-5)


def test_accumulation_equals_one_large_batch(config, tmp_path):
    config = replace(config, balance="none", steps=6, log_every=1)
    run_training(config)
    halves = replace(config, batch_size=2, accumulate=2, out=str(tmp_path / "halves"))
    run_training(halves)
    for first, second in zip(rows(config), rows(halves), strict=True):
        for name in ("loss", "lm_loss", "val_loss"):
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=1e-4)
        assert first.get("grad_norm", 0) == pytest.approx(second.get("grad_norm", 0), rel=1e-3)


def test_schedule_and_training_progress(config):
    config = replace(config, log_every=1, steps=40, warmup=0.1, eval_every=0)
    run_training(config)
    rates = [row["learning_rate"] for row in rows(config) if "loss" in row]
    assert rates[4] == pytest.approx(config.lr)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert config.min_lr <= rates[-1] < 1.1 * config.min_lr
    losses = [row["lm_loss"] for row in rows(config) if "loss" in row]
    assert losses[0] > math.log(256) - 0.5
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert [row["step"] for row in rows(config) if "val_loss" in row] == [40]


@pytest.mark.any_device
def test_only_matrices_decay(config):
    result = run_training(replace(config, steps=1))
    names = PoolTrainer.get_decay_parameter_names(None, result.model)
    left = {n for n, _ in result.model.named_parameters()} - set(names)
    assert any(n.endswith("router.scale") for n in left)
    assert all("norm" in n or n.endswith(".scale") for n in left)
    assert any("gate_up_proj" in n for n in names)


def test_dense_and_bf16(config):
    dense = replace(config, form="dense", pool_size=None, steps=2, precision="bf16", log_every=1)
    result = run_training(dense)
    assert type(result.model).__name__ == "LlamaForCausalLM"
    assert result.validation.load is None
    assert rows(dense)[0]["loss"] == pytest.approx(math.log(320), rel=0.05)


def test_evaluation_is_exact(config):
    result = run_training(replace(config, steps=3))
    model, blocks = result.model, ValBlocks(result.data.val, 32)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = validate(model, blocks, 3), validate(model, blocks, 8)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert first.tokens == len(result.data.val) - 1
    nats = 0.0
    model.eval()
    with torch.no_grad():
        for start in blocks.starts:
            ids = torch.tensor(result.data.val[start : start + 32].astype("int64"))[None]
            ids = ids.to(config.device)
            scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            nats -= scores.gather(1, ids[0, 1:, None]).sum().item()
    assert first.loss == pytest.approx(nats / first.tokens, rel=1e-5)
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    load = torch.tensor(first.load)
    assert load.shape == (2, 4)
    assert torch.allclose(load.sum(1), torch.ones(2), atol=1e-6)


def random_states():
    """Of the generators that training goes on with."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if TORCH_SEES_CUDA else [])]


def test_generation_from_run_checkpoint_and_model(config):
    run_training(replace(config, steps=3))
    out = Path(config.out)
    texts = []
    for path in (out, out / "model", out / "checkpoints" / "step-3"):
        model, tokenizer = load_model(path, config.device)
        assert model.config.use_cache
        state = random_states()
        texts.append(generate_text(model, tokenizer, "def ", 20, seed=1))
        assert all(map(torch.equal, random_states(), state))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("def ")
    assert generate_text(model, tokenizer, "def ", 20, seed=2) != texts[0]
    greedy = generate_text(model, tokenizer, "def ", 20, temperature=0.0, seed=1)
    assert greedy == generate_text(model, tokenizer, "def ", 20, temperature=0.0, seed=2)
    flip(out / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"is damaged: model\.safetensors does not match"):
        load_model(out)
    with pytest.raises(InputError, match="holds neither a model nor a run"):
        load_model(out.parent)
