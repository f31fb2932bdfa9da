# SPDX-License-Identifier: Apache-2.0
"""Tokenizers whose largest id is past their length, and ids that no vocabulary has."""

import numpy as np
import pytest

from unipool.data.tokenizer import HuggingFaceTokenizer, used_ids
from unipool.data.tokens import load_data
from unipool.errors import InputError

pytest.importorskip("transformers")
pytestmark = pytest.mark.any_device


@pytest.fixture(params=[5000, (1 << 16) - 1, (1 << 16) + 50])
def gap(request):
    return request.param


@pytest.fixture
def tokenizer(gap, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e")]
    made = Tokenizer(models.BPE(vocab={**alphabet, "th": 256, "the": gap}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "tokenizer")
    return HuggingFaceTokenizer(tmp_path / "tokenizer")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the cat and the dog\n" * 400)
    return path


def test_ids_past_the_length_are_kept(tokenizer, gap, text, tmp_path):
    assert len(tokenizer.hugging_face()) < gap
    assert tokenizer.vocab_size > tokenizer.separator > gap
    assert gap in used_ids(tokenizer.hugging_face())
    data = load_data([text], tokenizer, cache=tmp_path / "cache")
    ids = np.concatenate([data.train, data.val])
    # "the" after a space is another token of bytes' level: one in a line begins it
    found = int((ids == gap).sum())
    assert found == sum(int((row == gap).sum()) for row in tokenizer.encode([text.read_bytes()]))
    assert found > 0
    assert int((ids == tokenizer.separator).sum()) == 2


@pytest.mark.parametrize("wrong", [-1, 1 << 16, 1 << 40])
def test_ids_of_no_vocabulary_are_refused(wrong, tokenizer, text, tmp_path, monkeypatch):
    usual = tokenizer.encode
    tokenizer.vocab_size = 1 << 16
    tokenizer.separator = 7

    def encode(texts):
        rows = [np.minimum(row, 9) for row in usual(texts)]
        rows[0][0] = wrong
        return rows

    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(InputError, match=rf"ids in \[0, 65536\), got {wrong}"):
        load_data([text], tokenizer, cache=tmp_path / "cache")
