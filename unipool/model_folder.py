# SPDX-License-Identifier: Apache-2.0
"""What a model folder asks of those who load it, looked at before any of it is loaded.

A folder may come from anyone. Its JSON files can name code of its own, kernels to download and
files elsewhere; none of that is followed unless the caller said so. Standard library only.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unipool.errors import InputError
from unipool.json_files import read_json

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# Files in which transformers looks for classes to import from the folder.
_WITH_CODE = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
GENERATION = "generation_config.json"
_OTHERS = (GENERATION, "special_tokens_map.json", "added_tokens.json")
_CUSTOM_GENERATE = Path("custom_generate", "generate.py")
_BRANCHES = ("num_beams", "num_beam_groups", "num_return_sequences")
_MOST_BRANCHES = 64
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Sizes of a model: every model has at least one weight for each pair of these that it names.
_SIZES = ("vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
_SIZES += ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
# What comes with PyTorch and transformers. Where the others' packages are absent, transformers
# would take a kernel from the hub instead.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check_path(path: Path, what: str) -> None:
    """InputError for a path that is no UTF-8: the libraries that read and write models take none.

    Text and results, which we read and write ourselves, may lie anywhere.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} {path} must be a path in UTF-8, for a model") from None


def check_tokenizer_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """InputError, in one line, for JSON that cannot be read, or code that is not trusted."""
    check_path(folder, "folder")
    for name in (*_WITH_CODE, *_OTHERS):
        if (folder / name).exists():
            values = _read_object(folder / name)
            if values.get("auto_map") and not trust_remote_code:
                raise InputError(
                    f"model: {folder} brings code of its own (auto_map in {name}), which is not "
                    "run; a command that has --trust-remote-code runs it if told so"
                )


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """As check_tokenizer_folder; and the folder must hold a model that is all in it."""
    if not (folder / CONFIG).exists():
        raise InputError(f"model: {folder} has no {CONFIG}")
    check_tokenizer_folder(folder, trust_remote_code)
    if (folder / _CUSTOM_GENERATE).exists() and not trust_remote_code:
        raise InputError(
            f"model: {folder} brings code of its own ({_CUSTOM_GENERATE}), which is not run; a "
            "command that has --trust-remote-code runs it if told so"
        )
    check_index(folder)
    config = _read_object(folder / CONFIG)
    _check_sizes(folder, config)
    _check_generation(folder / GENERATION)
    for key, value in _entries(config):
        if _IMPLEMENTATION.fullmatch(key):
            _check_implementation(folder / CONFIG, key, value)
        elif key == "transformers_weights" and value is not None:
            raise InputError(f"model: {folder / CONFIG} must not name {key}, got {value!r}")


def check_index(folder: Path) -> None:
    """InputError unless the weights are in files of the folder itself, each of them there."""
    path = folder / INDEX
    if not path.exists():
        return
    shards = _read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"model: {path} must map weights to files (weight_map)")
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"model: {path} must name .safetensors files of its own folder, got {name!r}"
            )
        if not (folder / name).is_file():
            raise InputError(f"model: {folder} lacks {name}, which {INDEX} names")


def leads_out(path: Path) -> Path | None:
    """Where a file or folder leads if that is outside the folder that it is in; None if it is not.

    Links into the blobs that the hub's cache keeps beside its snapshots count as inside.
    """
    folder, target = path.parent.resolve(), path.resolve()
    if target.parent == folder or folder in target.parents:
        return None
    inside = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    return None if inside and target.is_file() else target


def check_links(folder: Path) -> None:
    """InputError for a file that is a link to a place outside: a copy of it would be of that."""
    for path in sorted(folder.iterdir()):
        if (target := leads_out(path)) is not None:
            raise InputError(
                f"model: {path} is a link that leaves its folder, to {target}; put the file itself "
                "there, or remove the link"
            )


def _check_generation(path: Path) -> None:
    """InputError for a multiple of the memory and time that one text takes."""
    values = _read_object(path) if path.exists() else {}
    for name in _BRANCHES:
        value = values.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= _MOST_BRANCHES):
            raise InputError(f"model: {name} in {path} must be in [1, {_MOST_BRANCHES}]")
    for name in _TOKENS:
        value = values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in ids):
            raise InputError(f"model: {name} in {path} must be an id or a list of ids")


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """InputError for sizes that the weights cannot have, before a model of them is begun."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        width = part.get("hidden_size")
        for name in _SIZES:
            size = part.get(name)
            counts = type(size) is int and type(width) is int
            if counts and width > 0 and size * width > 2 * weights:  # four bits per weight
                raise InputError(
                    f"model: {folder / CONFIG} has {name} and hidden_size of together "
                    f"2**{(size * width).bit_length() - 1} weights or more, which {weights:,} "
                    "bytes cannot hold"
                )


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold names and values, got {type(values).__name__}")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{path} must hold valid Unicode: {error.reason}") from error
    return values


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Every name with its value, at whatever depth."""
    if isinstance(values, dict):
        yield from values.items()
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _entries(value)


def _check_implementation(path: Path, key: str, value: Any) -> None:
    """Of attention: one that comes with PyTorch or an installed package. Of experts: no path."""
    for one in value.values() if isinstance(value, dict) else (value,):
        if "attn" in key:
            package = _PACKAGES.get(one) if isinstance(one, str) else None
            fits = one is None or one in _ATTENTION or (package and _installed(package))
            due = f"one of {', '.join((*_ATTENTION, *filter(_there, _PACKAGES)))}"
        else:
            fits = one is None or (isinstance(one, str) and one.isidentifier())
            due = "the name of an implementation that is installed"
        if not fits:
            raise InputError(f"model: {key} in {path} must be {due}, got {one!r}")


def _there(name: str) -> bool:
    return _installed(_PACKAGES[name])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
