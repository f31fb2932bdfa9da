# SPDX-License-Identifier: Apache-2.0
"""The named shapes and routings of bench/workloads.py."""

import pytest
import tile_efficiency
import torch
from cases import Case
from specs import EXPERT_SPECS
from suite import check_against_oracle
from workloads import CI, PAPER, ROUTINGS, SKEWED, WORKLOADS, Workload, draw_counts, draw_ids, named

from unipool.ops import costs


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_names_and_sizes_tell_workloads_apart():
    keys = [(w.name, w.tokens) for w in WORKLOADS]
    assert len(set(keys)) == len(keys)
    assert all(1 <= w.top_k <= min(16, w.experts) for w in WORKLOADS)
    assert named("830m", 32768).tokens == 32768
    with pytest.raises(KeyError, match="no workload is named 'nothing'"):
        named("nothing")
    with pytest.raises(KeyError, match="at T 7"):
        named("830m", 7)


def test_scales_of_the_paper_have_their_models_pools():
    models = pytest.importorskip("unipool.models")
    for w in PAPER:
        config = models.preset(w.name)
        assert (w.d_model, w.d_ff) == (config.hidden_size, config.intermediate_size)
        assert (w.experts, w.layers) == (config.num_experts, config.num_hidden_layers)
        assert w.top_k == config.num_experts_per_tok


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("w", [*CI, named("182m", 8192)], ids=lambda w: w.name)
def test_counts_and_ids_follow_the_routing(w: Workload, routing: str):
    counts = draw_counts(w, routing, generator())
    assert int(counts.sum()) == w.rows
    assert int(counts.max()) <= w.tokens
    ids = draw_ids(w, routing, generator())
    assert ids.shape == (w.tokens, w.top_k)
    assert ids.dtype == torch.int32
    rows = ids.sort(1).values
    assert int(rows.min()) >= 0
    assert int(rows.max()) < w.experts
    assert (rows.diff() > 0).all(), "the ids of a token are distinct"
    again = draw_ids(w, routing, generator())
    assert torch.equal(ids, again)


def test_routings_are_what_they_are_called():
    w = Workload("", 4096, 1, 1, 64)
    load = {r: draw_ids(w, r, generator()).flatten().bincount(minlength=64) for r in ROUTINGS}
    mean = w.rows / w.experts
    assert load["uniform"].max() < 1.5 * mean
    assert load["zipf"].max() > 8 * mean
    assert int((load["quarter"] > 0).sum()) == 16
    assert abs(int(load["half to one"].max()) - w.rows / 2) < 0.05 * w.rows
    assert int((load["30% empty"] > 0).sum()) == 64 - 19
    assert SKEWED in ROUTINGS
    assert load[SKEWED].max() > 2 * mean, "the default load is skewed"


@pytest.mark.parametrize("spec", EXPERT_SPECS, ids=str)
@pytest.mark.parametrize("w", CI, ids=lambda w: w.name)
def test_ops_are_right_on_what_tests_and_benchmarks_share(spec, w, dtype, device):
    case = Case(w.name, w.tokens, w.experts, w.top_k, w.d_model, w.d_ff, routing="zipf")
    check_against_oracle(spec, case, dtype, device)


@pytest.mark.parametrize("w", [*CI, *PAPER], ids=lambda w: f"{w.name}-{w.tokens}")
def test_the_products_of_a_pass_add_up_to_its_cost(w: Workload):
    counts = draw_counts(w, "30% empty", generator())
    used = int((counts > 0).sum())
    up, down, hidden_bwd, input_bwd = tile_efficiency.layer_products(w, counts)
    sizes = (w.tokens, w.top_k, w.d_model, w.d_ff)
    forward, backward = costs.expert_mlp(*sizes, used, 2), costs.expert_mlp_bwd(*sizes, used, 2)
    assert up.bytes + down.bytes == forward.bytes
    assert up.flops + down.flops == forward.flops
    assert hidden_bwd.bytes + input_bwd.bytes == backward.bytes
    assert hidden_bwd.flops + input_bwd.flops == backward.flops
    products = tile_efficiency.wgrad_products(w, w.layers * counts)
    whole = costs.expert_wgrad(*sizes, w.experts, 2, w.layers)
    assert sum(p.bytes for p in products) == whole.bytes
    assert sum(p.flops for p in products) == whole.flops
