# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/evidence.md: intervals and verdicts from numbers that are known."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
import evidence_tables as tables  # noqa: E402

CONTENT = json.loads((ROOT / "bench" / "results" / "evidence.json").read_text())


@pytest.mark.parametrize("freedom", tables.QUANTILES)
def test_quantiles_are_those_of_students_t(freedom):
    """The density between -t and t, integrated, is 0.95 of all."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 2_000_001)[1:-1]  # x = sqrt(n) tan(angle)
    density = np.cos(angle) ** (freedom - 1)
    inside = np.abs(np.sqrt(freedom) * np.tan(angle)) <= tables.QUANTILES[freedom]
    assert density[inside].sum() / density.sum() == pytest.approx(0.95, abs=1e-4)


def test_interval():
    middle, low, high = tables.interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert high - middle == pytest.approx(4.303 / 3**0.5)
    assert middle - low == pytest.approx(high - middle)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([-1.0, -1.1, -0.9], "shows"),
        ([1.0, 1.1, 0.9], "opposite"),
        ([-1.0, -1.0, 0.5], "not resolved"),
        ([-1.0, 1.0], "not resolved"),
    ],
)
def test_verdicts(values, said):
    assert tables.verdict(values, "shows", "opposite") == said


def shifted(**by: float) -> dict:
    """The content with the losses of a model moved, by the start of its name."""
    content = copy.deepcopy(CONTENT)
    for entry in content["sweep"]["variants"]:
        for prefix, shift in by.items():
            if entry["name"].replace("-", "_").startswith(prefix):
                for run in entry["runs"]:
                    run["val_loss"] += shift
    return content


def claim_verdicts(content: dict) -> list[str]:
    text = tables.evidence(content)
    lines = text.partition("**Claims about loss**")[2].splitlines()
    return [line.split(" | ")[-1].rstrip(" |") for line in lines if line.startswith("| ")][2:6]


def test_claims_follow_the_losses():
    """One model far better or worse than all others moves exactly the claims that it is in."""
    assert claim_verdicts(shifted(softmax_6x8_k1_layer0=9.0))[:2] == ["shows", "shows"]
    worse = claim_verdicts(shifted(softmax_6x8_k1_layer0=-9.0))
    assert worse[:2] == ["the opposite shows", "does not show: worse"]
    assert worse[2:] == claim_verdicts(CONTENT)[2:]
    better = claim_verdicts(shifted(norm_1x48_k1_pool1=-9.0))
    assert [better[0], *better[2:]] == ["shows"] * 3
    assert claim_verdicts(shifted(norm_1x48_k1_layer1=-9.0))[2] == "the opposite shows"
    assert claim_verdicts(shifted(softmax_1x48_k1_pool1=-9.0))[3] == "the opposite shows"
    assert claim_verdicts(shifted(norm_1x24=-9.0))[1] == "shows"


@pytest.mark.parametrize("weights", ["rule", "kept"])
def test_the_probe_claim_follows_the_harm(weights):
    content = copy.deepcopy(CONTENT)
    for model in content["probe"]["models"]:
        for layer in model["probe"][weights]:
            layer["loss_increase"] = 2.0 if "norm" in model["model"] else 1.0
            layer["loss_increase"] += 0.01 * model["seed"] * (layer["layer"] + 1)
    text = tables.evidence(content)
    assert (
        f"weights *{weights}*, private less shared: -1.0000 [-1.0000, -1.0000]: the claim" in text
    )


def test_differences_are_taken_seed_by_seed():
    """A shift of both models in one seed changes no difference."""
    content = copy.deepcopy(CONTENT)
    for entry in content["sweep"]["variants"]:
        entry["runs"][0]["val_loss"] += 3.0
    before, after = (
        tables.evidence(c).partition("**Claims")[2].partition("**The routing")[0]
        for c in (CONTENT, content)
    )
    assert before == after


def test_the_results_are_of_runs_that_all_ended():
    for entry in CONTENT["sweep"]["variants"]:
        assert [run["status"] for run in entry["runs"]] == ["complete"] * 3
        assert {run["train_loss"][-1][0] for run in entry["runs"]} == {1000}
