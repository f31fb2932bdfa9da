# SPDX-License-Identifier: Apache-2.0
"""Models from runs, checkpoints and Hugging Face folders, and the device that they go to."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

import unipool.models  # noqa: F401  (registers UniPool with the Auto classes)
from unipool.checkpoints import find_model
from unipool.data.tokenizer import load_hugging_face, used_ids
from unipool.errors import InputError, first_line
from unipool.model_folder import CONFIG, check_model_folder
from unipool.models.memory import check_weights_hold

# Weights are safetensors, never a pickle, and nothing is fetched.
FROM_FOLDER = {"local_files_only": True, "use_safetensors": True, "weights_only": True}


def load_model(path: Path, device: str = "cpu", trust_remote_code: bool = False):
    """(model in evaluation mode, tokenizer) of `find_model(path)`.

    trust_remote_code: run the code that the folder brings; without, such a folder is refused.
    """
    folder = find_model(path, trust_remote_code)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its warnings repeat names out of the file
    if not trust_remote_code:
        check_weights_hold(load_config(folder), folder)
    options = {"trust_remote_code": trust_remote_code} | FROM_FOLDER
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(folder), output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises many kinds for an unusable folder
        raise InputError(f"model: cannot load {folder}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # which would be drawn at random
        raise InputError(f"model: {folder} lacks {len(missing)} weights, such as {missing[0]}")
    tokenizer = load_hugging_face(folder, trust_remote_code)
    check_vocabulary(model, tokenizer)
    if device == "cpu" and model.dtype == torch.float16:
        model = model.float()  # which holds every float16; our ops on the CPU take none
    return model.to(device).eval(), tokenizer


def check_vocabulary(model, tokenizer) -> None:
    """InputError for a tokenizer with an id that the model has no embedding of."""
    largest = max(used_ids(tokenizer), default=-1)
    embedded = model.get_input_embeddings().num_embeddings
    if largest >= embedded:
        raise InputError(
            f"model: {model.name_or_path or 'it'} has a tokenizer with ids up to {largest}, and "
            f"embeddings of the ids below {embedded}: the tokenizer is another model's"
        )


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in a folder, whose code is never run. Raises InputError."""
    check_model_folder(Path(folder))
    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for an unusable folder
        path = Path(folder, CONFIG)
        raise InputError(f"model: {path} describes no model: {first_line(error)}") from error


def resolve_device(name: str) -> str:
    """The device type that `name` ("auto", "cpu" or "cuda") means; InputError without CUDA."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device (see `unipool doctor`)")
    return name
