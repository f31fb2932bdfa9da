# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with its options: the losses and outputs that Llama gives, with balance."""

import warnings

import numpy as np
import pytest
import torch
from small_models import make_ids, make_model
from torch.nn import functional as F

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from unipool.models import AddsBalanceLoss, BalanceLossWarning

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore::unipool.models.BalanceLossWarning"),
]
KINDS = ["llama", "unipool"]


class BalancedTrainer(AddsBalanceLoss, Trainer):
    pass


def make(kind: str):
    torch.manual_seed(3)
    if kind == "unipool":
        return make_model(
            balance_delay=0, balance_coefficient=0.5, initializer_range=0.3, use_cache=False
        )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes))


def rows(count: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sequences whose first parts have no target, of various lengths."""
    ids = make_ids(count, length).cpu()
    labels = ids.clone()
    for row in range(count):
        labels[row, : row % 5] = -100
    return [{"input_ids": ids[i], "labels": labels[i]} for i in range(count)]


def make_trainer(model, folder, kind=BalancedTrainer, data=None, options=None, **others):
    options = {"per_device_train_batch_size": 2, "max_steps": 2} | (options or {})
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    return kind(model, arguments, train_dataset=data, **others)


def batch(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def expected(output, labels, smoothing: float, items: int | None) -> torch.Tensor:
    """Cross entropy on the next token, of float64, and the balance loss by part of the targets."""
    targets = labels[:, 1:].flatten()
    logits = output.logits[:, :-1].flatten(0, 1).double()
    total = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    here = (targets != -100).sum()
    share = 1.0 if items is None else here / items
    return total / (here if items is None else items) + getattr(output, "aux_loss", 0.0) * share


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_on_the_next_token(kind, smoothing, items, tmp_path):
    data = batch(rows(4))
    model = make(kind).train()
    options = {"label_smoothing_factor": smoothing}
    base = BalancedTrainer if kind == "unipool" else Trainer
    trainer = make_trainer(model, tmp_path, base, options=options)
    count = None if items is None else torch.tensor(items)
    output = model(data["input_ids"])
    loss = trainer.compute_loss(model, dict(data), num_items_in_batch=count)
    due = expected(output, data["labels"], smoothing, items)
    torch.testing.assert_close(loss.double(), due, rtol=1e-5, atol=1e-6)


def test_smoothing_without_the_base_class_warns(tmp_path):
    """As for any model, the Trainer's own loss has the language part alone."""
    model, data = make("unipool").train(), batch(rows(4))
    options = {"label_smoothing_factor": 0.1}
    plain = make_trainer(model, tmp_path, Trainer, options=options)
    with pytest.warns(BalanceLossWarning, match=r"add output\.aux_loss"):
        loss = plain.compute_loss(model, dict(data), num_items_in_batch=torch.tensor(40))
    balanced = make_trainer(model, tmp_path, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BalanceLossWarning)
        more = balanced.compute_loss(model, dict(data), num_items_in_batch=torch.tensor(40))
    targets = (data["labels"][:, 1:] != -100).sum()
    aux = model(data["input_ids"]).aux_loss * targets / 40
    torch.testing.assert_close(more - loss, aux)


@pytest.mark.parametrize("balanced", [False, True])
def test_compute_loss_func_gets_the_labels(balanced, tmp_path):
    model, data = make("unipool").train(), batch(rows(4))
    seen = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return outputs.logits.square().mean()

    base = BalancedTrainer if balanced else Trainer
    trainer = make_trainer(model, tmp_path, base, compute_loss_func=loss_of)
    loss, output = trainer.compute_loss(model, dict(data), return_outputs=True)
    assert seen[0].equal(data["labels"])
    aux = output.aux_loss if balanced else 0.0
    torch.testing.assert_close(loss, output.logits.square().mean() + aux)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_equal_one(kind, smoothing, tmp_path):
    """Micro-batches with unequal targets; only the language loss, as f of each is its own."""
    data, found = rows(4), []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = make(kind)
        if kind == "unipool":
            for balancer in model.model.balancers:
                balancer.coefficient = 0.0
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        options |= {"max_steps": 1, "learning_rate": 1e-2, "optim": "sgd", "warmup_steps": 0}
        options |= {"label_smoothing_factor": smoothing, "max_grad_norm": 0.0, "logging_steps": 1}
        trainer = make_trainer(model, tmp_path, data=data, options=options)
        trainer.train()
        found.append([p.detach().clone() for p in model.parameters()])
    start = make(kind).parameters()
    assert any(not a.equal(b) for a, b in zip(found[0], start, strict=True))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_step_gives_logits_and_nothing_else(kind, loss_only, tmp_path):
    model, data = make(kind).eval(), batch(rows(4))
    trainer = make_trainer(model, tmp_path)
    loss, logits, labels = trainer.prediction_step(model, dict(data), loss_only)
    output = model(**data)
    assert loss.equal(output.loss)
    if loss_only:
        assert logits is None
        assert labels is None
    else:
        assert logits.equal(output.logits)
        assert labels.equal(data["labels"])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_with_metrics_on_inputs_and_losses(kind, tmp_path):
    """Rows of a last, smaller batch count as much as others: gathered losses are one per row."""
    data, seen = rows(5), {}

    def metrics(prediction):
        seen["inputs"], seen["losses"] = prediction.inputs, prediction.losses
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.label_ids)}

    options = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2}
    trainer = make_trainer(
        make(kind), tmp_path, options=options, eval_dataset=data, compute_metrics=metrics
    )
    result = trainer.evaluate()
    whole = batch(data)
    assert result["eval_rows"] == 5
    assert np.array_equal(seen["inputs"], whole["input_ids"])
    assert np.array_equal(seen["labels"], whole["labels"])
    assert seen["logits"].shape == (5, 12, trainer.model.config.vocab_size)
    losses = [trainer.model(**batch(data[i : i + 2])).loss.item() for i in (0, 2, 4)]
    due = [losses[0]] * 2 + [losses[1]] * 2 + [losses[2]]
    np.testing.assert_allclose(seen["losses"], due, rtol=1e-6)
    np.testing.assert_allclose(result["eval_loss"], np.mean(due), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_neftune_noise_is_in_training_alone(kind, tmp_path):
    model, data = make(kind), rows(4)
    options = {"neftune_noise_alpha": 5.0, "learning_rate": 0.0, "logging_steps": 1}
    trainer = make_trainer(model, tmp_path, data=data, options=options)
    before = model.eval()(**batch(data)).logits
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert model.eval()(**batch(data)).logits.equal(before)
