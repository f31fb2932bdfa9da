# SPDX-License-Identifier: Apache-2.0
"""What the harness gets from the model: log-probabilities, batches, generation."""

import math
import re
import shutil

import eval_sets
import pytest
import torch
from eval_runs import evaluate, random_unipool, requests, train
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
)

from unipool.data.tokenizer import ByteTokenizer
from unipool.errors import InputError
from unipool.evaluation.harness import HarnessModel, quiet
from unipool.models.loading import load_model

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")


def harness_model(model, tokenizer=None, **options):
    options = {"max_length": 256, "batch_size": 8} | options
    with quiet():
        return HarnessModel(model, tokenizer or ByteTokenizer().hugging_face(), **options)


PAIRS = [("", "abc"), ("a b", " c"), ("a b ", "c"), ("a b", " d"), ("é", "ü" * 9), ("x" * 90, " y")]


@pytest.mark.parametrize("router", ["norm", "softmax", "recurrent"])
def test_batches_and_their_padding_change_nothing(router):
    model = random_unipool(router=router, num_experts=12)
    pairs = [(context + "w" * i, continuation) for i in range(4) for context, continuation in PAIRS]
    found = {}
    for batch_size in (1, 3, 8):
        with quiet():
            subject = harness_model(model, batch_size=batch_size)
            found[batch_size] = subject.loglikelihood(requests("loglikelihood", *pairs))
    wanted = [eval_sets.score(model, *pair) for pair in pairs]
    for answers in found.values():
        assert [value for value, _ in answers] == pytest.approx([v for v, _ in wanted], abs=2e-4)
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
    for batch_size in (3, 8):
        values = [value for value, _ in found[batch_size]]
        assert values == pytest.approx([value for value, _ in found[1]], abs=2e-5)


def test_log_probabilities_are_float32_for_a_bfloat16_model():
    model = random_unipool().bfloat16()
    with quiet():
        answers = harness_model(model, batch_size=1).loglikelihood(
            requests("loglikelihood", *PAIRS)
        )
    wanted = [eval_sets.score(model, *pair)[0] for pair in PAIRS]
    assert [value for value, _ in answers] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("max_length", [16, 256])
def test_rolling_log_likelihood_scores_every_byte_once(max_length):
    model = random_unipool()
    texts = ["a river", "the cold stone under the window, and a river of green glass"]
    with quiet():
        subject = harness_model(model, max_length=max_length, batch_size=2)
        found = subject.loglikelihood_rolling(
            requests("loglikelihood_rolling", *[(t,) for t in texts])
        )
    for text, value in zip(texts, found, strict=True):
        ids, total = [256, *text.encode()], 0.0
        # Windows of max_length; the last one is filled up with what went before.
        for start in range(1, len(ids), max_length):
            stop = min(start + max_length, len(ids))
            seen = ids[max(0, stop - 1 - max_length) if start > 1 else 0 : stop - 1]
            logits = model(input_ids=torch.tensor([seen])).logits[0].double()
            logp = torch.log_softmax(logits, -1)[-(stop - start) :]
            total += logp[range(stop - start), ids[start:stop]].sum().item()
        assert value == pytest.approx(total, abs=1e-3)
    assert subject.requests == {"made": 2}


def test_generation_is_greedy_until_a_stop_string():
    model = random_unipool()
    with torch.no_grad():
        model.lm_head.weight[300] = 100 * model.lm_head.weight[101]  # an id past the tokenizer's
    prompts = ["a river", "the", "a cold stone under"]

    def greedy(prompt, count=20):
        ids = list(prompt.encode())
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits[:257].argmax()))
        return bytes(i for i in ids[len(prompt) :] if i < 256).decode("utf-8", "replace")

    texts = [greedy(prompt) for prompt in prompts]
    stop = texts[2][5:7]
    options = {"until": [stop], "max_gen_toks": 20, "do_sample": False}
    for batch_size in (1, 3):
        with quiet():
            subject = harness_model(model, batch_size=batch_size)
            found = subject.generate_until(
                requests("generate_until", *[(prompt, dict(options)) for prompt in prompts])
            )
        assert found == [text.split(stop)[0] for text in texts]
    assert 0 < len(found[2]) < len(texts[2])
    with pytest.raises(InputError, match=r"--max-length 16: .*\(20\) must be less"):
        harness_model(model, max_length=16).generate_until(
            requests("generate_until", ("a", dict(options)))
        )


def test_the_end_token_of_training_when_the_tokenizer_names_none():
    def three_letters():
        words = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
        return PreTrainedTokenizerFast(tokenizer_object=words)

    # The one past the tokenizer's is how `unipool train` separates texts with such a tokenizer.
    for end, text in ((1, "b"), (3, "<|endoftext|>")):
        subject = harness_model(random_unipool(eos_token_id=end), three_letters())
        assert (subject.eot_token_id, subject.prefix_token_id) == (end, end)
        assert subject.tokenizer.eos_token == text
    for end in (None, 5, [1, 2]):
        model = random_unipool()
        model.config.eos_token_id = end
        said = rf"must have an end-of-text token .* got {re.escape(str(end))}$"
        with pytest.raises(InputError, match=said):
            harness_model(model, three_letters())


def test_special_tokens_only_where_training_had_them(tmp_path):
    """A tokenizer that begins each text with a token of its own; here it is byte 1."""
    tokenizer = ByteTokenizer().hugging_face()
    first = tokenizer.convert_ids_to_tokens(1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, 1)]
    )
    tokenizer.bos_token = first
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = train(tmp_path, "--tokenizer", str(tmp_path / "tokenizer"))
    folder = shutil.copytree(run / "model", tmp_path / "elsewhere")
    text = {"lambada_openai": [{"text": "cold river"}]}
    sets = eval_sets.write_rows(tmp_path / "sets", text)
    model, _ = load_model(folder)
    for checkpoint, context in ((run, "cold"), (folder, "\x01cold")):
        found = evaluate(tmp_path, checkpoint, "--data", sets, "--task", "lambada_openai")
        nats, _ = eval_sets.score(model, context, " river")
        perplexity = found["tasks"][0]["metrics"]["perplexity"]["value"]
        assert perplexity == pytest.approx(math.exp(-nats), rel=1e-4)
    for special, begin in ((False, 256), (True, 1)):
        subject = harness_model(model, load_model(folder)[1], special_tokens=special)
        assert subject.prefix_token_id == begin
