# SPDX-License-Identifier: Apache-2.0
"""Configurations of small runs."""

import pytest

from unipool.training.config import TrainConfig


@pytest.fixture
def config(text, tmp_path, device):
    return TrainConfig(
        init_std=0.1,
        d_model=32,
        d_ff=32,
        layers=2,
        heads=2,
        pool_size=4,
        data=(str(text),),
        seq_len=32,
        batch_size=4,
        steps=12,
        lr=1e-2,
        min_lr=1e-3,
        warmup=0.25,
        device=device.type,
        out=str(tmp_path / "run"),
        save_every=3,
        eval_every=6,
        eval_tokens=512,
        log_every=4,
    )
