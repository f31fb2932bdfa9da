# SPDX-License-Identifier: Apache-2.0
"""The model in a checkpoint, and the text to look at it with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unipool.checkpoints import checked_model
from unipool.data.corpus import path_documents
from unipool.data.tokenizer import HuggingFaceTokenizer
from unipool.data.tokens import ValBlocks, default_cache
from unipool.errors import InputError
from unipool.models.loading import load_model, resolve_device
from unipool.training.config import TrainConfig, find_run
from unipool.training.resuming import read_key
from unipool.training.run import tokenise


@dataclass(frozen=True)
class Subject:
    """A model and its text. source: where the text comes from, for the reader of a result."""

    folder: Path
    model: torch.nn.Module
    blocks: ValBlocks
    batch_size: int
    source: str

    @property
    def batches(self) -> Callable[[], Iterator[Tensor]]:
        """A function that gives the same batches of ids [B, S] each time."""
        return lambda: self.blocks.batches(self.batch_size)


def load_subject(
    checkpoint: Path,
    data: list[Path] | None,
    *,
    field: str = "text",
    tokens: int = 1 << 15,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Subject:
    """The model of `checkpoint`, and about `tokens` tokens (0: all) of text.

    data: files or folders to take the text from, their beginning; None takes the text that was held
    out in the training run which `checkpoint` belongs to. Raises InputError, in one line, if there
    is no usable model, no text, or a checkpoint of a run without its manifest.
    """
    if tokens < 0 or batch_size < 1:
        raise InputError(f"--tokens must be >= 0 and --batch-size >= 1, got {tokens}, {batch_size}")
    folder = checked_model(checkpoint, trust_remote_code)
    run = find_run(folder)
    if data is None and run is None:
        raise InputError(f"--data is needed: {checkpoint} is not from a run of `unipool train`")
    if data is not None:  # read before the model, so that a wrong path shows at once
        tokenizer = HuggingFaceTokenizer(folder, trust_remote_code)
        ids, source = _text_tokens(data, field, tokenizer, tokens), ", ".join(map(str, data))
    else:
        ids, source = _held_out_tokens(*run), "text held out in training"
    model, _ = load_model(folder, resolve_device(device), trust_remote_code)
    length = _sequence_length(model, run and run[1], seq_len)
    if len(ids) < 2 or int(ids.max()) >= model.config.vocab_size:
        raise InputError(
            f"data: {source} must give at least 2 tokens below the model's vocab_size="
            f"{model.config.vocab_size}, got {len(ids)} up to {int(max(ids, default=0))}"
        )
    return Subject(folder, model, ValBlocks(ids, length, tokens), batch_size, source)


def _held_out_tokens(folder: Path, run: TrainConfig) -> np.ndarray:
    data, _ = tokenise(run, default_cache())
    if data.key != read_key(folder):
        raise InputError(
            f"data: the text of {folder} has changed since, so that what was held out is not "
            "known; choose a text with --data"
        )
    return data.val


def _text_tokens(
    paths: list[Path], field: str, tokenizer: HuggingFaceTokenizer, limit: int
) -> np.ndarray:
    parts, count = [], 0
    for document in path_documents(paths, field):
        ids = np.append(tokenizer.encode([document.text])[0], tokenizer.separator)
        parts.append(ids)
        count += len(ids)
        if limit and count > limit:
            break
    ids = np.concatenate(parts)
    # The document that ends the text has no separator to predict what follows from.
    return (ids[: limit + 1] if limit else ids[:-1]).astype(np.int64)


def _sequence_length(model, run: TrainConfig | None, given: int | None) -> int:
    most = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    length = given if given is not None else (run.seq_len if run else min(512, most))
    if not 2 <= length <= most:
        raise InputError(f"--seq-len must be in [2, {most}], got {length}")
    return length
