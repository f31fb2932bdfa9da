# SPDX-License-Identifier: Apache-2.0
"""Trained models to resize."""

import torch
from small_models import make_ids, make_model


def make_trained(**overrides):
    """A model and its AdamW after two steps, so that moments and balance state are not zero."""
    model = make_model(**({"num_experts": 6} | overrides)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(2):
        train_step(model, optimizer, seed)
    return model, optimizer


def train_step(model, optimizer, seed):
    ids = make_ids(seed=seed)
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()
