# SPDX-License-Identifier: Apache-2.0
"""Runs of `unipool train`, and what they leave behind."""

import os
import signal
from pathlib import Path

from unipool.training.metrics import read_metrics
from unipool.training.trainer import PoolTrainer


def rows(config):
    """The metrics of a run, without what a clock measured."""
    found = read_metrics(Path(config.out, "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """Let this process receive a signal in the middle of step `step` + 1."""
    usual = PoolTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(PoolTrainer, "training_step", training_step)
