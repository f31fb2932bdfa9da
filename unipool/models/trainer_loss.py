# SPDX-License-Identifier: Apache-2.0
"""The balance loss where transformers' Trainer computes the loss outside of the model."""

import warnings

import torch
from torch import Tensor


class BalanceLossWarning(UserWarning):
    """A training step's loss is made of the logits alone, so that nothing balances the experts."""


def warn_of_loss_outside() -> None:
    """Of a step whose labels the Trainer kept from the model."""
    warnings.warn(
        "the loss is computed outside of the model, without the balance loss: add output.aux_loss "
        "to it, or derive the Trainer from unipool.models.AddsBalanceLoss",
        BalanceLossWarning,
        stacklevel=3,
    )


class AddsBalanceLoss:
    """Base before `transformers.Trainer` for label_smoothing_factor and compute_loss_func.

        class BalancedTrainer(AddsBalanceLoss, Trainer): ...

    With these two the Trainer takes the labels away from the model and computes a loss of the
    logits; this adds the balance loss, weighted as the model would have. Without them it changes
    nothing. A compute_loss_func must not add it as well.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for module in self.model.modules():  # also inside of an adapter's wrapper
            if hasattr(module, "balance_loss_is_added"):
                module.balance_loss_is_added = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outside = self.label_smoother is not None or self.compute_loss_func is not None
        labels = inputs.get("labels") if outside else None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if labels is not None and getattr(outputs, "aux_loss", None) is not None:
            loss = loss + outputs.aux_loss * targets_of_step(labels, num_items_in_batch)[1]
        return (loss, outputs) if return_outputs else loss


def targets_of_step(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **_,
) -> tuple[Tensor, Tensor | float]:
    """Target tokens that the language loss is divided by, and the weight of the balance loss.

    With num_items_in_batch (target tokens of all micro-batches of an optimizer step) the language
    loss is a sum divided by that number, so the losses of the micro-batches add up to one mean. The
    balance loss is already a mean over the micro-batch: added whole, n micro-batches would count it
    n times. Weighted by its part of the target tokens it stays a mean over the step, too. Without a
    target there is no loss: the number is at least 1, so that it is 0 and not 0 / 0.
    """
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    here = (targets != ignore_index).sum()
    if num_items_in_batch is None:
        return here.clamp(min=1), 1.0
    of_step = torch.as_tensor(num_items_in_batch, device=here.device).clamp(min=1)
    return of_step, here / of_step
