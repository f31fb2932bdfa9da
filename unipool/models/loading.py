# SPDX-License-Identifier: Apache-2.0
"""Models from runs, checkpoints and Hugging Face folders, and the device that they go to."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from unipool.checkpoints import find_model
from unipool.data.tokenizer import load_hugging_face
from unipool.errors import InputError


def load_model(path: Path, device: str = "cpu"):
    """(model in evaluation mode, tokenizer) of `find_model(path)`."""
    folder = find_model(path)
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model: cannot load {folder}: {reason}") from error
    return model.to(device).eval(), load_hugging_face(folder)


def resolve_device(name: str) -> str:
    """The device type that `name` ("auto", "cpu" or "cuda") means; InputError without CUDA."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device (see `unipool doctor`)")
    return name
