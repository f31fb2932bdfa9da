# SPDX-License-Identifier: Apache-2.0
"""Metrics of routings against plain versions of them."""

import math
import random
from itertools import product

import pytest
import torch
from plain_metrics import plain_entropy, plain_gini, plain_information, plain_jaccard

from unipool.analysis import metrics

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("small_scale")


TOKENS, EXPERTS = 40, 5


def draw_routing(seed, k, tokens=TOKENS):
    generator = random.Random(seed)
    rows = [generator.sample(range(EXPERTS), k) for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int32)


def copied(a, seed, fraction=0.7):
    """`a` with some tokens routed elsewhere: related to it, but not the same."""
    other = draw_routing(seed, a.shape[1], len(a))
    keep = torch.tensor([random.Random(seed + t).random() < fraction for t in range(len(a))])
    return torch.where(keep[:, None], a, other)


@pytest.mark.parametrize("counts", [[3, 1, 4, 1, 5], [7, 0, 0, 2], [4, 4, 4], [9]])
def test_entropy_and_gini(counts):
    load = torch.tensor(counts)
    assert metrics.entropy(load).item() == pytest.approx(plain_entropy(counts), abs=1e-12)
    assert metrics.gini(load) == pytest.approx(plain_gini(counts), abs=1e-12)


def test_entropy_and_gini_at_their_ends():
    assert metrics.entropy(torch.ones(3, 8)).tolist() == pytest.approx([3.0] * 3)
    assert metrics.entropy(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist() == [0.0, 0.0]
    assert metrics.gini(torch.tensor([0, 0, 0, 9])) == pytest.approx(0.75)
    assert metrics.gini(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_jaccard_and_information(k):
    a = draw_routing(1, k)
    b = copied(a, 2)
    a[3, -1] = -1  # a slot without an expert
    counts = [sum(row.count(e) for row in a.tolist()) for e in range(EXPERTS)]
    assert metrics.expert_load(a, EXPERTS).tolist() == counts
    assert metrics.jaccard(a, b) == pytest.approx(plain_jaccard(a, b), abs=1e-12)
    found = metrics.mutual_information(a, b, EXPERTS, EXPERTS)
    assert found == pytest.approx(plain_information(a, b), abs=1e-12)
    assert found > 0.01


def test_information_of_known_layers():
    a = torch.arange(64).remainder(4)[:, None]
    assert metrics.mutual_information(a, 3 - a, 4, 4) == pytest.approx(2.0)  # a bijection
    independent = torch.arange(64).div(4, rounding_mode="floor").remainder(4)[:, None]
    assert metrics.mutual_information(a, independent, 4, 4) == pytest.approx(0.0, abs=1e-12)
    coarse = a.div(2, rounding_mode="floor")  # says one of the two bits, and from another range
    assert metrics.mutual_information(a, coarse, 4, 7) == pytest.approx(1.0)


def test_cross_layer_pairs_pools_and_baseline():
    a = draw_routing(1, 1, 2000)
    layers = [a, copied(a, 2), draw_routing(3, 1, 2000)]
    found = metrics.cross_layer(layers, [0, 0, 1], [EXPERTS] * 3, shuffles=4)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        information = plain_information(layers[i], layers[j])
        for row, column in ((i, j), (j, i)):
            assert found.information[row, column] == pytest.approx(information, abs=1e-12)
    assert found.jaccard[0, 1] == pytest.approx(plain_jaccard(*layers[:2]), abs=1e-12)
    assert found.jaccard[:2, 2].isnan().all()  # ids of another pool name other experts
    assert all(matrix.diagonal().isnan().all() for matrix in found)
    bias = (EXPERTS - 1) ** 2 / (2 * 2000 * math.log(2))
    shuffled = found.information_shuffled[0, 1].item()
    assert shuffled == pytest.approx(bias, rel=0.8)
    assert found.information[0, 1] > 20 * shuffled
    assert found.jaccard_shuffled[0, 1] == pytest.approx(1 / EXPERTS, abs=0.03)
    assert metrics.mean_off_diagonal(found.jaccard) == pytest.approx(found.jaccard[0, 1].item())
    assert metrics.mean_off_diagonal(torch.ones(1, 1)) is None


def test_weight_similarity(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    up, down = torch.randn(4, 6, 3), torch.randn(4, 3, 5)
    up[3], down[3] = -2 * up[0], -2 * down[0]
    found = metrics.weight_similarity(up, down)
    for i, j in product(range(4), range(4)):
        a = [*up[i].flatten().tolist(), *down[i].flatten().tolist()]
        b = [*up[j].flatten().tolist(), *down[j].flatten().tolist()]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosine = dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        assert found[i, j].item() == pytest.approx(cosine, abs=1e-9)
    assert found[0, 3].item() == pytest.approx(-1.0)
    assert metrics.weight_similarity(torch.zeros(2, 3)).eq(0).all()
