# SPDX-License-Identifier: Apache-2.0
"""The first optimizer steps of a run, weight by weight, against the formula of AdamW in float64."""

import math
from dataclasses import replace

import pytest

from unipool.training.run import run_training
from unipool.training.trainer import PoolTrainer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")

BETAS, EPS = (0.9, 0.95), 1e-8


class Recording:
    """Per step and parameter: the gradient as the backward left it, and the weight before and
    after; learning rates are not read but computed."""

    def __init__(self, monkeypatch):
        self.steps: list[dict[str, dict]] = []
        usual = PoolTrainer.create_optimizer

        def create_optimizer(trainer, *args, **kwargs):
            optimizer = usual(trainer, *args, **kwargs)
            names = {p: n for n, p in trainer.model.named_parameters()}
            gradients = {}
            for parameter in names:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: gradients.update({names[p]: wide(p.grad)})
                )
            before = {}
            optimizer.register_step_pre_hook(
                lambda *_: before.update({n: wide(p) for p, n in names.items()})
            )
            optimizer.register_step_post_hook(
                lambda *_: self.steps.append(
                    {n: {"grad": gradients[n], "before": before[n], "after": wide(p)}
                     for p, n in names.items()}
                )
            )  # fmt: skip
            return optimizer

        monkeypatch.setattr(PoolTrainer, "create_optimizer", create_optimizer)


def wide(tensor):
    return tensor.detach().cpu().double().clone()


def learning_rate(config, step):
    """Of step 0, 1, ...: linear from 0 to lr, then half a cosine down to min_lr."""
    warm = math.ceil(config.warmup * config.steps)
    if step < warm:
        return config.lr * step / warm
    done = (step - warm) / (config.steps - warm)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def decays(name):
    return not (name.endswith(".scale") or "norm" in name)


def norm_of(step):
    return math.sqrt(sum(entry["grad"].square().sum().item() for entry in step.values()))


def check_steps(config, steps):
    moments = dict.fromkeys(steps[0], (0.0, 0.0, 0.0))
    for t, step in enumerate(steps):
        rate = learning_rate(config, t)
        clip = min(1.0, config.clip / norm_of(step))
        for name, entry in step.items():
            grad, before = entry["grad"] * clip, entry["before"]
            first, second, size = moments[name]
            first = BETAS[0] * first + (1 - BETAS[0]) * grad
            second = BETAS[1] * second + (1 - BETAS[1]) * grad * grad
            size = BETAS[0] * size + (1 - BETAS[0]) * grad.abs()  # of what cancels in `first`
            moments[name] = first, second, size
            divisor = (second / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS
            step_size = rate / (1 - BETAS[0] ** (t + 1)) / divisor
            decay = rate * config.weight_decay * decays(name) * before
            change = step_size * first + decay
            # Two roundings of a float32 weight, and relative errors of the update: of a few
            # operations, and of the clipping coefficient, whose norm is a float32 sum plus 1e-6.
            bound = 2**-23 * before.abs() + 1e-5 * (step_size * size + decay.abs()) + 1e-12
            excess = ((entry["after"] - before + change).abs() / bound).max().item()
            assert excess <= 1, f"step {t + 1}, {name}: {excess:.1f} times the bound"


CONFIGS = {
    "clipped": {"clip": 0.05},
    "free": {"clip": 1e4},
    "cold": {"warmup": 0.0, "clip": 0.5},
    "heavy": {"weight_decay": 2.0, "min_lr": 0.0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_formula(config, monkeypatch, name):
    config = replace(config, eval_every=0, save_every=12, **CONFIGS[name])
    steps = Recording(monkeypatch).steps
    run_training(config)
    assert len(steps) == config.steps
    assert (max(map(norm_of, steps)) > 2 * config.clip) == (name != "free")
    check_steps(config, steps)
