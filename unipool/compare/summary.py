# SPDX-License-Identifier: Apache-2.0
"""What the runs of a sweep come to: means, spreads, and differences to the layer-private model."""

from dataclasses import asdict
from statistics import mean, stdev

import torch

import unipool
from unipool.compare.grid import Baseline, Variant, vanilla
from unipool.compare.members import Member, Outcome, failure, known_outcome
from unipool.compare.sweep import Sweep
from unipool.data.tokenizer import load_tokenizer
from unipool.models import parameter_counts
from unipool.training.config import TrainConfig


def summarize(sweep: Sweep, members: list[Member]) -> dict:
    """Content of results.json.

    Losses are nats per token. Each variant has `runs`, one entry a seed; `val_loss`, over the seeds
    that are complete; and `difference`, of the validation loss to the layer-private model of the
    same granularity, seed by seed (equal seeds mean equal text, held-out text and order): negative
    is better. Both are {"mean", "std", "n"}: std is the sample's, None below two, mean None
    without any. A run's folder is relative to the sweep's.
    """
    baseline = Baseline.of(sweep.scale)
    tokenizer = load_tokenizer(members[0].config.tokenizer)
    found = {(m.variant, m.config.seed): (m, known_outcome(m)) for m in members}
    return {
        "scale": sweep.scale,
        "seeds": list(sweep.seeds),
        "options": sweep.options,
        "torch": torch.__version__,
        "unipool": unipool.__version__,
        "variants": [_entry(v, sweep, baseline, tokenizer, found) for v in sweep.variants],
    }


def _entry(variant: Variant, sweep: Sweep, baseline: Baseline, tokenizer, found: dict) -> dict:
    reference = vanilla(baseline, variant.granularity)
    members = [found[variant, seed] for seed in sweep.seeds]
    losses = {seed: _loss(found[variant, seed][1]) for seed in sweep.seeds}
    theirs = {seed: _loss(found[reference, seed][1]) for seed in sweep.seeds}
    both = [s for s in sweep.seeds if losses[s] is not None and theirs[s] is not None]
    return {
        "name": variant.name,
        "label": label(variant, baseline),
        **asdict(variant),
        "baseline": reference.name,
        **_counts(members[0][0].config, tokenizer),
        "val_loss": statistics([loss for loss in losses.values() if loss is not None]),
        "difference": statistics([losses[s] - theirs[s] for s in both]),
        "runs": [_run(member, result) for member, result in members],
    }


def _loss(result: Outcome | None) -> float | None:
    return None if result is None else result.val_loss


def _run(member: Member, result: Outcome | None) -> dict:
    run = {"seed": member.config.seed, "folder": "/".join(member.folder.parts[-3:])}
    if result is not None:
        return run | {"status": "complete", **vars(result)}
    reason = failure(member)
    return run | ({"status": "failed", "reason": reason} if reason else {"status": "missing"})


def label(variant: Variant, baseline: Baseline) -> str:
    """`vanilla` for the layer-private model, else the name."""
    if variant != vanilla(baseline, variant.granularity):
        return variant.name
    return "vanilla" if variant.granularity == 1 else f"vanilla-k{variant.granularity}"


def _counts(config: TrainConfig, tokenizer) -> dict[str, int]:
    counts = parameter_counts(config.model_config(tokenizer.vocab_size, tokenizer.separator))
    return {f"params_{name}": count for name, count in counts.items()}


def statistics(values: list[float]) -> dict:
    return {
        "mean": mean(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }
