# SPDX-License-Identifier: Apache-2.0
"""What a forward takes: the cache by either name, and nothing that would change nothing."""

import inspect

import pytest
import torch
from small_models import make_ids, make_model

pytest.importorskip("transformers")
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

from unipool.models import UniPoolForCausalLM, UniPoolModel
from unipool.models.arguments import CACHE

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize(
    ("ours", "theirs"), [(UniPoolForCausalLM, LlamaForCausalLM), (UniPoolModel, LlamaModel)]
)
@pytest.mark.any_device
def test_the_signature_is_llamas(ours, theirs):
    """generate() and Trainer look arguments up there, and some callers give them by place."""
    shown, due = (list(inspect.signature(c.forward).parameters.items()) for c in (ours, theirs))
    assert [(name, p.kind, p.default) for name, p in shown] == [
        (name, p.kind, p.default) for name, p in due
    ]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_used_by_either_name(name):
    model, ids = make_model(initializer_range=0.3).eval(), make_ids(2, 9)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], **{name: cache})
    assert cache.get_seq_length() == 6
    output = model(ids[:, 6:], **{name: cache})
    assert output[CACHE] is cache
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(output.logits, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_is_that_without():
    """Weights so large that a token which does not see the others shows in the next."""
    model, ids = make_model(initializer_range=0.3).eval(), make_ids(2, 5)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, **options)
    assert cached.shape == (2, 29)
    assert cached.equal(model.generate(ids, use_cache=False, **options))


@pytest.mark.any_device
def test_both_names_at_once_are_refused():
    model, ids = make_model(), make_ids(1, 4)
    caches = {name: DynamicCache(config=model.config) for name in ("cache", "past_key_values")}
    with pytest.raises(TypeError, match="give cache or past_key_values, not both"):
        model(ids, **caches)
    model(ids, cache=caches["cache"], past_key_values=None)
    assert caches["cache"].get_seq_length() == 4


@pytest.mark.parametrize("name", ["past_key_value", "label", "attn_mask", "cache_position"])
@pytest.mark.any_device
def test_an_unknown_argument_is_refused(name):
    model, ids = make_model(), make_ids(1, 4)
    for forward in (model, model.model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            forward(ids, **{name: torch.ones(1)})
        forward(ids, **{name: None})  # as callers do for what they have not


@pytest.mark.any_device
def test_router_logits_are_refused_by_name():
    model, ids = make_model(), make_ids(1, 4)
    with pytest.raises(TypeError, match=r"output\.routings has each layer's"):
        model(ids, output_router_logits=True)
    model(ids, output_router_logits=False)


@pytest.mark.any_device
def test_what_the_library_knows_is_taken():
    model, ids = make_model(attn_implementation="eager"), make_ids(1, 4)
    output = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert len(output.attentions) == model.config.num_hidden_layers
    shifted = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    assert model(ids, labels=ids, shift_labels=shifted).lm_loss.equal(output.lm_loss)
    assert isinstance(model(ids, return_dict=False), tuple)
