# SPDX-License-Identifier: Apache-2.0
"""Documents, held-out split, token files, and the order of training sequences."""

import json
import math
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from unipool.data.corpus import path_documents, stdlib_documents
from unipool.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from unipool.data.tokens import TrainBlocks, ValBlocks, check_length, load_data, shuffled
from unipool.errors import InputError

BYTES = ByteTokenizer()


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a real part of the standard library's source."""
    folder = tmp_path_factory.mktemp("sources")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in ("json", "email", "http"):
        for path in sorted((stdlib / package).glob("*.py")):
            (folder / f"{package}_{path.name}").write_bytes(path.read_bytes())
    return folder


def split_documents(tokens, separator=256):
    """The documents of a token file, as bytes."""
    ids = np.asarray(tokens)
    assert ids[-1] == separator
    pieces = np.split(ids, np.flatnonzero(ids == separator) + 1)[:-1]
    return [bytes(piece[:-1].astype(np.uint8)) for piece in pieces]


# --- corpus


def test_standard_library_is_the_default_corpus(cache):
    documents = list(stdlib_documents())
    names = [document.name for document in documents]
    assert "json/decoder.py" in names
    assert not any("site-packages" in name for name in names)
    text = next(d.text for d in documents if d.name == "json/decoder.py")
    assert text == Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_bytes()
    assert sum(len(d.text) for d in documents) > 5e6
    assert [d.name for d in stdlib_documents()] == names


def test_standard_library_skips_what_is_not_utf8(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert [d.name for d in stdlib_documents(tmp_path)] == ["good.py"]
    with pytest.raises(InputError, match="no Python source"):
        list(stdlib_documents(tmp_path / "nowhere"))


def test_text_jsonl_and_folders(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "zw\\u00f6lf", "id": 2}\n')
    (tmp_path / ".hidden").write_bytes(b"\xff\xff")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("end")
    documents = list(path_documents([tmp_path]))
    assert [d.text for d in documents] == [b"hello\r\n", b"one", "zwölf".encode(), b"end"]
    assert documents[2].name == f"{tmp_path / 'b.jsonl'}:3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt does not exist"),
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2 is not JSON"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl:1 must be a JSON object, got list"),
        ("field.jsonl", b'{"body": "a"}\n', r"field\.jsonl:1 has no field 'text' \(fields: body\)"),
        ("type.jsonl", b'{"text": 3}\n', r"type\.jsonl:1 field 'text' must be a string, got int"),
        ("bytes.jsonl", b'{"text": "a"}\n"\xff"\n', r"bytes\.jsonl:2 is not UTF-8"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', r"half\.jsonl:1 .* not valid Unicode"),
        ("blank.jsonl", b"\n\n", r"blank\.jsonl has no row with text in field 'text'"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, cache, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as failure:
        load_data([path], BYTES, cache=cache)
    assert "\n" not in str(failure.value)
    assert not list(cache.rglob("*.bin")), "nothing may be cached from unusable text"


def test_too_short(tmp_path, cache):
    path = tmp_path / "short.txt"
    path.write_text("only a few words here, no more\n" * 2)
    data = load_data([path], BYTES, cache=cache)
    check_length(data, 16, "short.txt")
    with pytest.raises(InputError, match=r"short\.txt is shorter than one sequence: \d+ tokens"):
        check_length(data, 256, "short.txt")


def test_empty_folder(tmp_path, cache):
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match=r"void holds no file with text"):
        load_data([tmp_path / "void"], BYTES, cache=cache)


# --- split and token files


def test_split_is_by_document_complete_and_deterministic(sources, cache):
    data = load_data([sources], BYTES, cache=cache, val_fraction=0.1, seed=3)
    train, val = split_documents(data.train), split_documents(data.val)
    texts = [d.text for d in path_documents([sources])]
    assert Counter(train + val) == Counter(texts), "each document is on one side, whole"
    assert data.train_documents == len(train)
    assert data.val_bytes == sum(map(len, val))
    assert 0.05 < data.val_bytes / (data.val_bytes + data.train_bytes) < 0.12
    again = load_data([sources], BYTES, cache=cache / "b", val_fraction=0.1, seed=3)
    assert np.array_equal(again.train, data.train)
    assert again.key == data.key
    other = load_data([sources], BYTES, cache=cache, val_fraction=0.1, seed=4)
    assert split_documents(other.val) != val


def test_split_ignores_names_and_keeps_duplicates_together(tmp_path, cache):
    for index in range(40):
        (tmp_path / f"{index:02}.txt").write_text(f"text number {index % 20}\n" * 5)
    data = load_data([tmp_path], BYTES, cache=cache, val_fraction=0.2)
    train, val = split_documents(data.train), split_documents(data.val)
    assert val
    assert not set(train) & set(val)
    for path in list(tmp_path.glob("*.txt")):
        path.rename(path.with_name("z" + path.name))
    renamed = load_data([tmp_path], BYTES, cache=cache, val_fraction=0.2)
    assert set(split_documents(renamed.val)) == set(val)


def test_one_document_gives_its_tail(tmp_path, cache):
    path = tmp_path / "one.txt"
    text = "".join(f"line {i} – ü\n" for i in range(200))
    path.write_text(text, encoding="utf-8")
    data = load_data([path], BYTES, cache=cache)
    (train,), (val,) = split_documents(data.train), split_documents(data.val)
    assert train + val == text.encode()
    assert train.endswith(b"\n")
    assert 0.03 < len(val) / len(text.encode()) < 0.1
    path.write_text("é" * 100, encoding="utf-8")  # no line end to cut at, two bytes a character
    (train,) = split_documents(load_data([path], BYTES, cache=cache).train)
    train.decode("utf-8")


def test_cache_is_reused_and_a_damaged_one_rebuilt(sources, cache):
    data = load_data([sources], BYTES, cache=cache)
    (folder,) = (cache / "tokens").iterdir()
    before = (folder / "train.bin").stat().st_mtime_ns
    load_data([sources], BYTES, cache=cache)
    assert (folder / "train.bin").stat().st_mtime_ns == before
    wanted = np.array(data.train)
    damaged = bytearray((folder / "train.bin").read_bytes())
    damaged[1000] ^= 4
    del data
    (folder / "train.bin").write_bytes(damaged)
    assert np.array_equal(load_data([sources], BYTES, cache=cache).train, wanted)


def test_changed_text_changes_the_key(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 50)
    first = load_data([path], BYTES, cache=cache).key
    path.write_text("some text\n" * 49 + "same text\n")
    assert load_data([path], BYTES, cache=cache).key != first


# --- tokenizers


@pytest.fixture(scope="module")
def bpe_folder(sources, tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in sorted(sources.glob("json_*"))], trainer)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def test_byte_tokenizer_is_the_same_as_its_hugging_face_form():
    text = "def f(x):\n\treturn 'é–😀' \x00\x7f\x80\n" + bytes(range(128)).decode()
    tokenizer = BYTES.hugging_face()
    assert tokenizer(text)["input_ids"] == list(BYTES.encode([text.encode()])[0])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == BYTES.separator
    assert BYTES.vocab_size >= len(tokenizer)


def test_hugging_face_tokenizer(sources, bpe_folder, cache):
    tokenizer = load_tokenizer(bpe_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    data = load_data([sources], tokenizer, cache=cache)
    assert data.separator == tokenizer.hugging_face().convert_tokens_to_ids("<end>")
    assert data.vocab_size == 640
    as_bytes = load_data([sources], BYTES, cache=cache)
    assert data.key != as_bytes.key
    assert data.val_bytes == as_bytes.val_bytes
    assert len(data.val) < len(as_bytes.val)
    ids = list(data.val[: list(data.val).index(data.separator)])
    assert tokenizer.hugging_face().decode(ids).encode() == split_documents(as_bytes.val)[0]


def test_bad_tokenizer_folder(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer: cannot load") as failure:
        load_tokenizer(tmp_path)
    assert "\n" not in str(failure.value)


def test_bits_per_byte_does_not_depend_on_the_tokenizer(sources, bpe_folder, cache):
    """A model that spends b bits on each byte of text must score b, whatever its tokens."""
    for tokenizer in (BYTES, load_tokenizer(bpe_folder)):
        data = load_data([sources], tokenizer, cache=cache)
        total_nats = 3.0 * math.log(2) * data.val_bytes
        assert data.bits_per_byte(total_nats / len(data.val)) == pytest.approx(3.0, rel=1e-12)
    uniform = load_data([sources], BYTES, cache=cache)
    expected = 8 * len(uniform.val) / uniform.val_bytes  # separators cost bits, too
    assert uniform.bits_per_byte(math.log(256)) == pytest.approx(expected)


# --- order of sequences


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_shuffle_is_a_permutation(count, seed, epoch):
    assert sorted(shuffled(i, count, seed, epoch) for i in range(count)) == list(range(count))


def test_shuffle_mixes():
    count = 1000
    orders = [
        [shuffled(i, count, seed, epoch) for i in range(count)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        # Correlation of position and value of a random permutation: standard deviation 1 / sqrt(n).
        assert abs(np.corrcoef(order, range(count))[0, 1]) < 5 / math.sqrt(count)
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / math.sqrt(count)
    for first, second in ((0, 1), (0, 2)):
        same = sum(a == b for a, b in zip(orders[first], orders[second], strict=True))
        assert same < 8  # Poisson with mean 1


def test_shuffle_order_is_fixed_for_good():
    """A resumed run must see the order that it began with, also after an upgrade."""
    assert [shuffled(i, 10, 7, 2) for i in range(10)] == FIXED_ORDER


def test_the_order_hangs_on_seed_and_epoch_and_on_each_in_its_own_way():
    tokens = np.arange(500, dtype=np.uint16)
    orders = set()
    for seed in range(8):
        blocks = TrainBlocks(tokens, 5, seed=seed, length=800)
        starts = [int(blocks[i]["input_ids"][0]) for i in range(800)]
        orders |= {tuple(starts[epoch * 100 : epoch * 100 + 100]) for epoch in range(8)}
    assert len(orders) == 64


FIXED_ORDER = [2, 8, 9, 3, 5, 7, 4, 6, 1, 0]


def test_train_blocks_cover_each_epoch_once():
    tokens = np.arange(105, dtype=np.uint16)
    blocks = TrainBlocks(tokens, 10, seed=5, length=25)
    for epoch in (0, 1):
        starts = [int(blocks[epoch * 10 + i]["input_ids"][0]) for i in range(10)]
        assert sorted(starts) == list(range(0, 100, 10))
    item = blocks[3]
    assert item["input_ids"].dtype == torch.int64
    assert item["input_ids"].tolist() == list(
        range(item["input_ids"][0], item["input_ids"][0] + 10)
    )
    assert torch.equal(item["input_ids"], item["labels"])


@pytest.mark.parametrize("length", [2, 9, 10, 11, 19, 37])
def test_val_blocks_predict_each_token_once(length):
    tokens = np.arange(length, dtype=np.uint16)
    predicted = Counter()
    for batch in ValBlocks(tokens, 10).batches(2):
        assert batch.shape[0] <= 2
        predicted.update(batch[:, 1:].flatten().tolist())
    assert predicted == Counter(range(1, length))


def test_val_blocks_limit_is_spread_evenly():
    blocks = ValBlocks(np.arange(1001, dtype=np.uint16), 11, limit=250)
    assert len(blocks.starts) == 25
    assert blocks.starts == list(range(0, 1000, 40))


def test_cache_files_are_plain(sources, cache):
    load_data([sources], BYTES, cache=cache)
    (folder,) = (cache / "tokens").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert (folder / "val.bin").stat().st_size == 2 * meta["val_tokens"]
