# SPDX-License-Identifier: Apache-2.0
"""Token files: split by document, tokenised once, memory-mapped, sampled by position.

The order of training sequences is a pure function of (seed, epoch, position), so a run resumes at
any step without replaying what came before.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unipool.data.corpus import Document, path_documents, stdlib_documents
from unipool.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from unipool.errors import InputError
from unipool.files import complete_folder, folder_fault, remove_leftovers
from unipool.json_files import read_json

_FORMAT = 1
_BATCH_BYTES = 4 << 20  # text tokenised at a time, to bound memory
_MASK64 = (1 << 64) - 1
_DAY = 86400.0
_DTYPES = ("<u2", "<u4")
_TRIES = 3  # to find or make a complete cache, which another process may be replacing


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus. `train` and `val` are memory-mapped 1-D unsigned integer arrays."""

    key: str  # content hash: same text, tokenizer, seed and split <=> same key
    train: np.ndarray
    val: np.ndarray
    train_bytes: int  # bytes of text in each split, separators not counted
    val_bytes: int
    train_documents: int
    val_documents: int
    vocab_size: int
    separator: int

    @property
    def val_tokens_per_byte(self) -> float:
        return len(self.val) / self.val_bytes

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Held-out loss in nats per token, as bits per byte of text: alike for all tokenizers."""
        return nats_per_token * self.val_tokens_per_byte / math.log(2)


def default_cache() -> Path:
    """$UNIPOOL_CACHE, else the user's cache folder."""
    if own := os.environ.get("UNIPOOL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unipool"


def load_data(
    paths: list[Path] | None,
    tokenizer: ByteTokenizer | HuggingFaceTokenizer,
    *,
    field: str = "text",
    seed: int = 0,
    val_fraction: float = 0.05,
    cache: Path | None = None,
) -> TokenData:
    """Tokenise `paths` (None: the standard library's source) or reuse the cached result.

    Whole documents are held out, chosen by content and seed; equal documents always fall on the
    same side. A corpus of one document gives its tail. Raises InputError in one line.
    """

    def documents() -> Iterator[Document]:
        return path_documents(paths, field) if paths else stdlib_documents()

    sizes, key = _survey(documents(), tokenizer.fingerprint, seed, val_fraction)
    held_out = _held_out(sizes, seed, val_fraction)
    folder = Path(cache or default_cache()) / "tokens" / key[:32]
    for _ in range(_TRIES):
        data = _open_tokens(folder, key, tokenizer)
        if data is not None:
            return data
        _write_tokens(folder, documents(), tokenizer, held_out, key, val_fraction)
    raise InputError(f"data: {folder} does not hold what was written to it; is the disk sound?")


def check_length(data: TokenData, seq_len: int, source: str) -> None:
    """InputError unless both splits hold enough for one sequence."""
    if len(data.train) < seq_len:
        raise InputError(
            f"data: {source} is shorter than one sequence: {len(data.train)} tokens to train on, "
            f"--seq-len is {seq_len}"
        )
    if len(data.val) < 2:
        raise InputError(f"data: {source} leaves no text to hold out; add text or documents")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:16]


def _survey(documents, fingerprint: str, seed: int, val_fraction: float):
    """Sizes by content digest, and the key of the token files that these documents give."""
    sizes: dict[bytes, int] = {}
    key = hashlib.sha256(repr((_FORMAT, fingerprint, seed, val_fraction)).encode())
    for document in documents:
        digest = _digest(document.text)
        key.update(digest)
        sizes[digest] = sizes.get(digest, 0) + len(document.text)
    return sizes, key.hexdigest()


def _held_out(sizes: dict[bytes, int], seed: int, fraction: float) -> set[bytes] | None:
    """Digests of the documents to hold out, or None where a single document must be cut in two."""
    if len(sizes) < 2:
        return None
    goal = fraction * sum(sizes.values())
    salt = str(seed).encode()
    chosen: set[bytes] = set()
    taken = 0
    for digest in sorted(sizes, key=lambda d: hashlib.sha256(salt + d).digest()):
        if taken + sizes[digest] <= max(goal, 1) * 1.05:
            chosen.add(digest)
            taken += sizes[digest]
    return chosen or {min(sizes, key=lambda d: (sizes[d], d))}


def _cut_point(text: bytes, fraction: float) -> int:
    """Where to cut a single document: after the line end nearest before its last `fraction`."""
    cut = len(text) - max(1, round(len(text) * fraction))
    line = text.rfind(b"\n", 0, cut) + 1
    if line > len(text) * (1 - 2 * fraction):
        return line
    while cut > 0 and (text[cut] & 0xC0) == 0x80:  # not inside a character
        cut -= 1
    return cut


def _splits(documents, held_out, fraction) -> Iterator[tuple[str, bytes]]:
    for document in documents:
        if held_out is None:
            cut = _cut_point(document.text, fraction)
            yield "train", document.text[:cut]
            yield "val", document.text[cut:]
        else:
            yield ("val" if _digest(document.text) in held_out else "train"), document.text


def _batches(pieces: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch, size = [], 0
    for split, text in pieces:
        if text:
            batch.append((split, text))
            size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_tokens(folder, documents, tokenizer, held_out, key: str, fraction: float) -> None:
    dtype = np.dtype(_DTYPES[tokenizer.vocab_size > 1 << 16])
    meta = {
        "key": key,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
    }
    for split in ("train", "val"):
        meta |= {f"{split}_bytes": 0, f"{split}_tokens": 0, f"{split}_documents": 0}
    remove_leftovers(folder.parent, older_than=_DAY)

    def complete(other: Path) -> bool:
        return _open_tokens(other, key, tokenizer) is not None

    with complete_folder(folder, keep=complete) as staging, contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(staging / f"{s}.bin", "wb")) for s in ("train", "val")}
        for batch in _batches(_splits(documents, held_out, fraction)):
            encoded = tokenizer.encode([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                ids = np.append(ids, tokenizer.separator)
                _check_ids(ids, tokenizer.vocab_size)
                files[split].write(ids.astype(dtype).tobytes())
                meta[f"{split}_bytes"] += len(text)
                meta[f"{split}_tokens"] += len(ids)
                meta[f"{split}_documents"] += 1
        (staging / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """InputError for ids that the vocabulary has not: narrowed, they would be those of others."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"tokenizer: it must give ids in [0, {vocab_size}), got {low if low < 0 else high}"
        )


def _open_tokens(folder: Path, key: str, tokenizer) -> TokenData | None:
    """The tokens in `folder`; None unless they are complete, and what `key` and `tokenizer` give.

    A cache may be shared, so nothing in it is taken on trust.
    """
    if folder_fault(folder) is not None:
        return None
    try:
        meta = read_json(folder / "meta.json")
        return _token_data(folder, meta, key, tokenizer)
    except (InputError, OSError, ValueError):  # another process may just be replacing it
        return None


def _token_data(folder: Path, meta, key: str, tokenizer) -> TokenData:
    """ValueError for a meta.json that is not the one we write for these files."""
    splits = ("train", "val")
    counts = [f"{s}_{n}" for s in splits for n in ("bytes", "tokens", "documents")]
    due = {"key": key, "vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator}
    if not isinstance(meta, dict) or set(meta) != {*due, *counts, "dtype"}:
        raise ValueError("other names than ours")
    if any(meta[name] != value for name, value in due.items()):
        raise ValueError("another text or tokenizer")
    if meta["dtype"] not in _DTYPES or not all(_is_count(meta[name]) for name in counts):
        raise ValueError("values that we do not write")
    dtype, arrays = np.dtype(meta["dtype"]), {}
    for split in splits:
        path, tokens = folder / f"{split}.bin", meta[f"{split}_tokens"]
        if path.stat().st_size != tokens * dtype.itemsize:
            raise ValueError("another number of tokens")
        # An empty file cannot be mapped.
        array = np.memmap(path, dtype, mode="r", shape=(tokens,)) if tokens else np.zeros(0, dtype)
        if tokens and array.max() >= tokenizer.vocab_size:
            raise ValueError("ids past the vocabulary")
        arrays[split] = array
    sizes = {f"{s}_{n}": meta[f"{s}_{n}"] for s in splits for n in ("bytes", "documents")}
    return TokenData(**due, **arrays, **sizes)


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _mix(value: int) -> int:
    """The splitmix64 finaliser: every bit of the result depends on every bit of `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def shuffled(position: int, count: int, seed: int, epoch: int) -> int:
    """Entry `position` of a random permutation of range(count), in O(1) time and memory.

    A 4-round Feistel network over the next even power of two, walked until it lands in range. It
    depends on no random library, so a run resumes alike under any version of one.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(_mix(seed) ^ epoch)
    index = position
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ (right << 3 | turn)) & mask)
        index = left << half | right
        if index < count:
            return index


def _ids(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


class TrainBlocks(Dataset):
    """Sequences of `seq_len` tokens in shuffled order, epoch after epoch, `length` in all."""

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, length: int):
        self.tokens, self.seq_len, self.seed, self.length = tokens, seq_len, seed, length
        self.blocks = len(tokens) // seq_len  # in one epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(index, self.blocks)
        start = shuffled(position, self.blocks, self.seed, epoch) * self.seq_len
        ids = _ids(self.tokens[start : start + self.seq_len])
        return {"input_ids": ids, "labels": ids}


class ValBlocks:
    """Held-out sequences that overlap by one token, so each token but the first is predicted once.

    limit: greatest number of tokens to predict, 0 for all; sequences are then spread evenly. Only
    the last sequence of the split may be shorter than `seq_len`.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, limit: int = 0):
        self.tokens, self.seq_len = tokens, seq_len
        stride = seq_len - 1
        total = -(-(len(tokens) - 1) // stride)
        count = min(total, max(1, limit // stride)) if limit else total
        self.starts = [(i * total // count) * stride for i in range(count)]

    def batches(self, size: int) -> Iterator[Tensor]:
        """int64 [B, S] with B <= size."""
        rows: list[Tensor] = []
        for start in self.starts:
            row = _ids(self.tokens[start : start + self.seq_len])
            if rows and (len(rows) == size or len(row) != len(rows[0])):
                yield torch.stack(rows)
                rows = []
            rows.append(row)
        yield torch.stack(rows)
