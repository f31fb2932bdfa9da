# SPDX-License-Identifier: Apache-2.0
"""Held-out loss and expert load of a causal language model."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from unipool.data.tokens import ValBlocks


@dataclass(frozen=True)
class Validation:
    """loss: mean cross-entropy in nats per token, without any balance loss.

    load: for each layer, the fraction of its (token, slot) pairs that each expert of its pool got;
    None for a model without experts.
    """

    loss: float
    tokens: int
    load: list[list[float]] | None


@torch.no_grad()
def validate(model, blocks: ValBlocks, batch_size: int, precision: str = "fp32") -> Validation:
    """Run `model` in evaluation mode over `blocks`; its mode is put back afterwards."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, tokens, load = 0.0, 0, None
    try:
        for ids in blocks.batches(batch_size):
            ids = ids.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = model(input_ids=ids, use_cache=False)
            logits = outputs.logits[:, :-1].flatten(0, 1).float()
            nats += F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
            tokens += ids[:, 1:].numel()
            if getattr(outputs, "routings", None):
                counts = outputs.load.to("cpu", torch.int64)
                load = counts if load is None else load + counts
    finally:
        model.train(training)
    if load is not None:
        load = (load.double() / load.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    return Validation(nats / tokens, tokens, load)
