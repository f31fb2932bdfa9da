# SPDX-License-Identifier: Apache-2.0
"""Bytes, or any Hugging Face tokenizer folder, behind one small interface."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unipool.errors import InputError, first_line
from unipool.model_folder import check_tokenizer_folder

SEPARATOR = "<|endoftext|>"
_VOCABULARY_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken")


class ByteTokenizer:
    """Token id = byte value; id 256 separates documents."""

    separator = 256
    vocab_size = 320  # 257 padded, see padded_vocab_size
    fingerprint = "bytes"

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """One int array a text, without special tokens."""
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def hugging_face(self):
        """The same mapping as a Hugging Face tokenizer, for saving beside a model."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=SEPARATOR,
            clean_up_tokenization_spaces=False,
        )


class HuggingFaceTokenizer:
    """A tokenizer folder as transformers saves it; its end-of-text token separates documents."""

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"tokenizer: {folder} is not a folder")
        self._tokenizer = load_hugging_face(self.folder, trust_remote_code)
        self._tokenizer.model_max_length = int(1e30)  # documents are cut into sequences later
        eos = self._tokenizer.eos_token_id
        end = max(used_ids(self._tokenizer), default=-1) + 1
        self.separator = end if eos is None else eos
        self.vocab_size = padded_vocab_size(max(end, self.separator + 1))
        self.fingerprint = _folder_hash(self.folder)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        strings = [text.decode("utf-8") for text in texts]
        ids = self._tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def hugging_face(self):
        return self._tokenizer


def load_hugging_face(folder: Path, trust_remote_code: bool = False):
    """AutoTokenizer of a local folder; InputError if there is none. Never looks on the network.

    trust_remote_code: run the code that the folder brings; without, such a folder is refused.
    """
    from transformers import AutoTokenizer

    if not any(p for glob in _VOCABULARY_FILES for p in Path(folder).glob(glob)):
        raise InputError(f"tokenizer: {folder} holds no tokenizer")
    check_tokenizer_folder(Path(folder), trust_remote_code)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # transformers raises many kinds for an unusable folder
        raise InputError(f"tokenizer: cannot load {folder}: {first_line(error)}") from error


def used_ids(tokenizer) -> set[int]:
    """Ids that a Hugging Face tokenizer may give. They may have gaps: len() is no bound of them."""
    return set(tokenizer.get_vocab().values())


def unused_ids(tokenizer, vocab_size: int) -> list[int]:
    """Ids below vocab_size that it never gives: they pad the output layer, and mean nothing."""
    return sorted({*range(vocab_size)} - used_ids(tokenizer))


def load_tokenizer(folder: Path | None) -> ByteTokenizer | HuggingFaceTokenizer:
    return ByteTokenizer() if folder is None else HuggingFaceTokenizer(folder)


def padded_vocab_size(size: int) -> int:
    """`size` rounded up to a multiple that keeps the output layer's matmul aligned."""
    multiple = 1024 if size > 8192 else 64
    return -(-size // multiple) * multiple


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte value.

    Printable Latin-1 characters stand for themselves; the other bytes take 256, 257, ... in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({p for glob in _TOKENIZER_FILES for p in folder.glob(glob) if p.is_file()}):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
