# SPDX-License-Identifier: Apache-2.0
"""UniPoolForCausalLM: numerics against plain PyTorch, balance state, training."""

import devices
import pytest
import torch
from small_models import FORMS, VANILLA, assert_all_equal, make_ids, make_model, states
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from unipool.models import (
    modeling_unipool,
)

pytestmark = pytest.mark.usefixtures("device")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_gradients_close(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 0, name
        # A router's scale has one element, often a sum that nearly cancels: hence the floor.
        bound = tolerance * max(want.abs().max().item(), 0.1)
        assert (actual[name] - want).abs().max() <= bound, name


# --- forward ---


def with_expert(output) -> torch.Tensor:
    """Of each layer: (token, slot) pairs that have an expert."""
    return torch.stack([(routing.experts >= 0).sum() for routing in output.routings])


@pytest.mark.parametrize("form", FORMS)
def test_output_has_the_documented_shapes(form):
    model = make_model(**FORMS[form]).train()
    ids = make_ids(2, 7)
    output = model(ids, labels=ids, output_hidden_states=True)
    assert output.logits.shape == (2, 7, 64)
    assert output.loss.shape == output.lm_loss.shape == output.aux_loss.shape == ()
    assert torch.equal(output.loss, output.lm_loss + output.aux_loss)
    assert [h.shape for h in output.hidden_states] == [(2, 7, 32)] * 5
    assert output.load.shape == (4, 8)
    assert torch.equal(output.load.sum(1), with_expert(output))
    for routing in output.routings:
        assert routing.weights.shape == routing.experts.shape == (14, 2)
        assert routing.importance.shape == (8,)
    assert output.past_key_values.get_seq_length() == 7
    assert model(ids, labels=ids, return_dict=False)[0].shape == ()


@pytest.mark.parametrize(
    ("num_pools", "expected"),
    [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 1, 2]), (4, [0, 1, 2, 3])],
)
def test_layer_l_uses_pool_floor_l_times_g_over_l(monkeypatch, num_pools, expected):
    model = make_model(num_pools=num_pools)
    assert len(model.model.pools) == num_pools
    used = []

    def spy(x, router, experts, original=modeling_unipool.pooled_moe):
        used.append(experts)
        return original(x, router, experts)

    monkeypatch.setattr(modeling_unipool, "pooled_moe", spy)
    model(make_ids(1, 3))
    pools = [pool.gate_up_proj.data_ptr() for pool in model.model.pools]
    assert [pools.index(experts.gate_up.data_ptr()) for experts in used] == expected
    assert [model.config.pool_index(layer) for layer in range(4)] == expected


class PlainMoE(nn.Module):
    """Softmax, top-k, and a loop over experts with ordinary linear layers."""

    def __init__(self, top_k, renormalize, router, gate_up, down):
        super().__init__()
        self.top_k, self.renormalize = top_k, renormalize
        self.router, self.gate_up, self.down = (
            nn.Parameter(p.detach().clone()) for p in (router, gate_up, down)
        )

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        probabilities = F.softmax(F.linear(x, self.router), dim=-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        self.fraction = F.one_hot(chosen, len(self.router)).sum((0, 1)) / chosen.numel()
        self.mean_probability = probabilities.mean(0)
        rows = [[] for _ in x]
        for expert in range(len(self.router)):
            for token, slot in (chosen == expert).nonzero().tolist():
                gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2)
                value = F.linear(F.silu(gate) * up, self.down[expert])
                rows[token].append(weights[token, slot] * value)
        return torch.stack([sum(row) for row in rows]).view_as(hidden)


@pytest.mark.parametrize(("top_k", "renormalize"), [(1, False), (2, False), (2, True)])
def test_vanilla_form_is_a_softmax_moe(top_k, renormalize):
    model = make_model(**VANILLA, num_experts_per_tok=top_k, norm_topk_prob=renormalize).train()
    config = model.config
    shared = LlamaConfig().to_dict().keys() & config.to_dict().keys() - {"model_type"}
    plain = LlamaForCausalLM(LlamaConfig(**{key: getattr(config, key) for key in shared}))
    plain.load_state_dict(model.state_dict(), strict=False)
    for layer, ours, pool in zip(
        plain.model.layers, model.model.layers, model.model.pools, strict=True
    ):
        weights = (ours.router.weight, pool.gate_up_proj, pool.down_proj)
        layer.mlp = PlainMoE(top_k, renormalize, *weights)
    plain = plain.to(devices.current()).train()

    ids = make_ids(2, 6)
    output, reference = model(ids, labels=ids), plain(ids, labels=ids)
    aux = sum(
        config.balance_coefficient * 8 * (layer.mlp.fraction * layer.mlp.mean_probability).sum()
        for layer in plain.model.layers
    )
    torch.testing.assert_close(output.logits, reference.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, reference.loss + aux, rtol=1e-5, atol=1e-5)
    assert reference.logits.std() > 0.5
    output.loss.backward()
    (reference.loss + aux).backward()
    expected = gradients(plain)
    for layer in range(4):
        for theirs, ours in (
            (f"layers.{layer}.mlp.router", f"layers.{layer}.router.weight"),
            (f"layers.{layer}.mlp.gate_up", f"pools.{layer}.gate_up_proj"),
            (f"layers.{layer}.mlp.down", f"pools.{layer}.down_proj"),
        ):
            expected[f"model.{ours}"] = expected.pop(f"model.{theirs}")
    assert_gradients_close(gradients(model), expected, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_generation_with_cache_equals_the_full_forward(form):
    model = make_model(**FORMS[form]).eval()
    ids = make_ids(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    result = model.generate(
        ids, **options, use_cache=True, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        full = model(result.sequences, use_cache=False).logits[:, 4:-1]
    cached = torch.stack(result.logits, 1)
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-4)
    assert full.std() > 0.5
    assert torch.equal(result.sequences[:, 5:], full.argmax(-1))
    assert torch.equal(result.sequences, model.generate(ids, **options, use_cache=False))


def test_generation_does_not_depend_on_left_padding():
    model = make_model().eval()
    short, long = make_ids(1, 3), make_ids(1, 7, seed=2)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch = torch.cat([F.pad(short, (4, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, 7:]
    assert torch.equal(together[:1], model.generate(short, **options)[:, 3:])
    assert torch.equal(together[1:], model.generate(long, **options)[:, 7:])


def test_padding_is_neither_routed_nor_balanced():
    model = make_model(balance_delay=0).train()
    first, second = make_ids(1, 4), make_ids(1, 6, seed=2)
    batch = torch.cat([F.pad(first, (0, 2)), second])
    mask = torch.ones_like(batch)
    mask[0, 4:] = 0
    output = model(batch, attention_mask=mask)
    alone = [model(ids) for ids in (first, second)]
    assert torch.equal(output.load, alone[0].load + alone[1].load)
    assert torch.equal(output.load.sum(1), with_expert(output))
    assert all(len(routing.experts) == 10 for routing in output.routings)
    torch.testing.assert_close(output.logits[:1, :4], alone[0].logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits[1:], alone[1].logits, rtol=1e-4, atol=1e-5)
    importance = [
        a.importance + b.importance for a, b in zip(*(o.routings for o in alone), strict=True)
    ]
    fraction = output.load.sum(0) / (4 * 10 * 2)
    expected = 0.1 * 8 * (fraction * (sum(importance) / (4 * 10))).sum()
    torch.testing.assert_close(output.aux_loss, expected)
    # The whole batch, masked or not, when there is nothing to leave out.
    full = model(batch, attention_mask=torch.ones_like(batch))
    assert torch.equal(full.load, model(batch).load)
    assert all(len(routing.experts) == 12 for routing in full.routings)


@pytest.mark.any_device
def test_model_refuses_inputs_it_cannot_read():
    model = make_model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


# --- balance ---


def by_hand(config, routings, fractions):
    """Equation (6) of the design for each group of layers; new fractions of the groups."""
    groups = [[layer] for layer in range(4)]
    if config.balance == "pool":
        groups = torch.arange(4).split(4 // config.num_pools)
    loss, new = 0.0, []
    for index, group in enumerate(groups):
        chosen = torch.cat([routings[layer].experts.flatten() for layer in group])
        fraction = torch.bincount(chosen[chosen >= 0], minlength=8) / chosen.numel()
        tokens = sum(len(routings[layer].experts) for layer in group)
        mean_score = sum(routings[layer].importance for layer in group) / tokens
        used = fractions[index] if config.balance_delay else fraction
        loss = loss + config.balance_coefficient * 8 * (used * mean_score).sum()
        new.append(fraction)
    return loss, new


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(
    ("balance", "num_pools"), [("pool", 1), ("pool", 2), ("pool", 4), ("layer", 1), ("layer", 4)]
)
def test_balance_loss_follows_the_equation(balance, num_pools, delay):
    model = make_model(balance=balance, num_pools=num_pools, balance_delay=delay).train()
    fractions = [torch.zeros(8, device=devices.current())] * (
        4 if balance == "layer" else num_pools
    )
    for step, length in enumerate([9, 5, 7]):  # token counts differ: stored fractions must not mind
        output = model(make_ids(2, length, seed=step))
        expected, fractions = by_hand(model.config, output.routings, fractions)
        torch.testing.assert_close(output.aux_loss, expected)
        assert (output.aux_loss > 0) == (step > 0 or delay == 0)
        assert_all_equal(states(model), fractions)


def test_no_balance_has_no_state_and_no_loss():
    model = make_model(balance="none").train()
    ids = make_ids(2, 5)
    output = model(ids, labels=ids)
    assert output.aux_loss == 0
    assert not [name for name in model.state_dict() if "balancer" in name]


def test_evaluation_reports_the_language_loss_and_moves_no_state():
    model, twin = make_model(), make_model()
    ids, other = make_ids(2, 6), make_ids(2, 9, seed=2)
    for each in (model, twin):
        each.train()
        each(ids)
    before = states(model)
    model.eval()
    output = model(other, labels=other)
    assert output.aux_loss is None
    assert torch.equal(output.loss, output.lm_loss)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), other[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert_all_equal(states(model), before)
    model.train()
    after = model(ids).aux_loss
    assert torch.equal(after, twin(ids).aux_loss)
    assert after > 0


@pytest.mark.parametrize("where", ["model.layers.2", "lm_head"])
def test_an_aborted_micro_batch_leaves_no_trace(where):
    model, twin = make_model(), make_model()
    batches = [make_ids(2, 6, seed=seed) for seed in range(3)]
    for each in (model, twin):
        each.train()
        each(batches[0])

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(batches[1], labels=batches[1])
    handle.remove()
    assert_all_equal(states(model), states(twin))
    for ids in batches[1:]:
        assert torch.equal(model(ids, labels=ids).loss, twin(ids, labels=ids).loss)


def test_two_forwards_may_precede_one_backward():
    model, twin = make_model().train(), make_model().train()
    first, second = make_ids(2, 6), make_ids(2, 6, seed=2)
    (model(first, labels=first).loss + model(second, labels=second).loss).backward()
    for ids in (first, second):
        twin(ids, labels=ids).loss.backward()
    assert_gradients_close(gradients(model), gradients(twin))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
@pytest.mark.parametrize("delay", [0, 1])
def test_gradient_checkpointing_changes_nothing(options, delay):
    model, twin = (make_model(balance_delay=delay).train() for _ in range(2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for step in range(3):
        ids = make_ids(2, 6, seed=step)
        outputs = [each(ids, labels=ids) for each in (model, twin)]
        for output in outputs:
            output.loss.backward()
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(outputs[0].load, outputs[1].load)
        assert_all_equal(states(model), states(twin))
        assert_gradients_close(gradients(model), gradients(twin))
    assert len(calls) == 6, "each layer must have been recomputed once per step"


# --- training ---


def test_accumulated_micro_batches_equal_their_weighted_mean():
    model = make_model(balance_delay=0).train()
    batches = [make_ids(2, 9), make_ids(2, 5, seed=2)]
    labels = [batch.clone() for batch in batches]
    labels[0][:, :4] = -100
    targets = [int((label[:, 1:] != -100).sum()) for label in labels]
    assert targets[0] != targets[1]

    plain = [model(ids, labels=label) for ids, label in zip(batches, labels, strict=True)]
    expected = sum(n * output.loss for n, output in zip(targets, plain, strict=True)) / sum(targets)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    total = 0.0
    for ids, label in zip(batches, labels, strict=True):
        output = model(ids, labels=label, num_items_in_batch=torch.tensor(sum(targets)))
        assert torch.equal(output.loss, output.lm_loss + output.aux_loss)
        output.loss.backward()
        total += output.loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert_gradients_close(gradients(model), expected_gradients)
    assert plain[0].aux_loss > 0.05, "the balance loss must weigh enough for this test to see it"


def test_accumulation_equals_one_large_batch_without_balance():
    model = make_model(balance="none").train()
    ids = make_ids(4, 7)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for part in ids.split(1):
        model(part, labels=part, num_items_in_batch=4 * 6).loss.backward()
    assert_gradients_close(gradients(model), expected)


@pytest.mark.parametrize("form", FORMS)
def test_model_learns_a_batch_by_heart(form):
    model = make_model(**FORMS[form], initializer_range=0.05).train()
    ids = make_ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        output = model(ids, labels=ids)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.lm_loss.item())
    assert losses[0] > 4.0
    assert losses[-1] < 0.5


@pytest.mark.parametrize("form", FORMS)
def test_distributed_data_parallel_finds_every_parameter_used(tmp_path, form, outlives_its_group):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_model(**FORMS[form]).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        outlives_its_group.append(parallel)
        for step in range(2):  # the second forward raises if the first left a parameter out
            ids = make_ids(1, 2, seed=step)  # fewer tokens than experts
            parallel(ids, labels=ids).loss.backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", ["norm", "vanilla", "recurrent"])
def test_compiles_without_graph_breaks(form):
    model, twin = (make_model(**FORMS[form], use_cache=False).train() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(2):
        ids = make_ids(2, 6, seed=step)
        loss, expected = compiled(ids, labels=ids).loss, twin(ids, labels=ids).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
    assert_gradients_close(gradients(model), gradients(twin), 1e-4)
    torch.testing.assert_close(states(model), states(twin))
