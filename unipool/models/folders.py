# SPDX-License-Identifier: Apache-2.0
"""Model folders and checkpoints, converted or resized: what `unipool convert` and `resize` run."""

import contextlib
import shutil
from pathlib import Path
from typing import Annotated

import torch
from safetensors import SafetensorError
from transformers import MixtralForCausalLM
from transformers.utils import logging as transformers_logging

from unipool import schema
from unipool.checkpoints import find_model
from unipool.configs import ConvertConfig, ResizeConfig
from unipool.errors import InputError, TrainingError, first_line
from unipool.files import MANIFEST, complete_folder
from unipool.json_files import read_json
from unipool.model_folder import check_links, check_path, leads_out
from unipool.models import UniPoolConfig, UniPoolForCausalLM
from unipool.models.convert import check_mixtral, from_mixtral, to_mixtral, to_private, to_shared
from unipool.models.loading import FROM_FOLDER, load_config
from unipool.models.memory import check_memory, check_weights_hold
from unipool.models.resize import resize_pool

OPTIMIZER = "optimizer.pt"
# What save_pretrained writes anew; also what another tool may have left of the same weights.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
)
_Load = Annotated[float, schema.Range(min=0)]
_EXISTS = "{} exists already: choose a new folder to write to"
_TRAINER_FILES = ("optimizer*", "scheduler*", "trainer_state*", "training_args*", "rng_state*")


def convert_folder(config: ConvertConfig) -> UniPoolConfig:
    """Write the model of a run, checkpoint or Hugging Face folder to another, converted.

    balance: of `to_shared`; untie: of `to_private`. Files beside the model, such as a tokenizer,
    are copied; the state of a trainer is not, for it belongs to other parameters. Returns the new
    model's configuration; raises InputError.
    """
    folder = _source(config.source, config.out)
    with _one_line():
        model = _load(folder)
        pools, layers = model.config.num_pools, model.config.num_hidden_layers
        if config.to == "shared":
            model = to_shared(model, config.balance) if pools > 1 else _refuse_shared()
        elif pools < layers:
            model = to_private(model, untie=config.untie)
        if config.to == "mixtral":
            model = to_mixtral(model)
    _write(model, folder, config.out, _MODEL_FILES + _TRAINER_FILES)
    return model.config


def resize_folder(config: ResizeConfig) -> list[list[int]]:
    """Write the model of a folder to another, with more or fewer experts; see `resize_pool`.

    A checkpoint's optimizer.pt goes along, and so do its other files: what is written is then a
    checkpoint to resume from with a model of the new config.json. load: JSON file with [L, M] or
    [M] numbers. Returns what `resize_pool` returns; raises InputError.
    """
    folder = _source(config.source, config.out)
    with _one_line():
        model = _load(folder)
        bytes_per_parameter = model.dtype.itemsize + 8 * (folder / OPTIMIZER).exists()
        changed = model.config.to_dict() | {"num_experts": config.experts, "layer_experts": None}
        check_memory(UniPoolConfig(**changed), "cpu", bytes_per_parameter)
        optimizer = _load_optimizer(model, folder)
        origins = resize_pool(
            model,
            config.experts,
            add=config.add,
            show=config.show,
            experts=config.chosen(),
            load=None if config.load is None else _read_load(config.load),
            seed=config.seed,
            optimizer=optimizer,
        )
    _write(model, folder, config.out, (*_MODEL_FILES, OPTIMIZER), optimizer)
    return origins


def _refuse_shared():
    raise InputError("--to shared: the model has one pool already")


def _source(source: Path, out: Path) -> Path:
    check_path(out, "folder")
    folder, out = find_model(source), Path(out)
    check_links(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(_EXISTS.format(out))
    return folder


@contextlib.contextmanager
def _one_line():
    """Errors of arguments and of files as InputError with one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(first_line(error)) from error


def _load(folder: Path) -> UniPoolForCausalLM:
    transformers_logging.disable_progress_bar()
    config = load_config(folder)
    check_weights_hold(config, folder)
    if isinstance(config, UniPoolConfig):
        return _complete(UniPoolForCausalLM, folder)
    check_mixtral(config)
    return from_mixtral(_complete(MixtralForCausalLM, folder))


def _complete(kind, folder: Path):
    """The model of a folder; InputError if it cannot be loaded, or would be drawn in part."""
    try:
        model, found = kind.from_pretrained(str(folder), output_loading_info=True, **FROM_FOLDER)
    except Exception as error:  # transformers raises many kinds for an unusable folder
        raise InputError(f"model: cannot load {folder}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"model: {folder} lacks {len(missing)} weights, such as {missing[0]}")
    return model


def _load_optimizer(model: UniPoolForCausalLM, folder: Path) -> torch.optim.Optimizer | None:
    """The AdamW that PoolTrainer saved beside the model, over the parameters of `model`."""
    path = folder / OPTIMIZER
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no such file lead to
        raise InputError(f"{path} cannot be read as an optimizer's state") from error
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    problem = f"{path} is not the optimizer of `unipool train` for this model"
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:  # as above
        raise InputError(problem) from error
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        moments = [getattr(state.get(name), "shape", None) for name in ("exp_avg", "exp_avg_sq")]
        if moments != [parameter.shape] * 2 or "step" not in state:
            raise InputError(problem)
    return optimizer


def _read_load(path: Path) -> torch.Tensor:
    try:
        values = read_json(path)
        if not values:
            raise ValueError("it is empty")
        schema.check(values, list[_Load] | list[list[_Load]])
        return torch.tensor(values, dtype=torch.float64)
    except ValueError as error:
        raise InputError(
            f"--load {path} must be JSON of [L, M] or [M] numbers: {first_line(error)}"
        ) from error


def _write(model, folder: Path, out: Path, left_out: tuple[str, ...], optimizer=None) -> None:
    """`out` with the model, the optimizer, and the files of `folder` that match no `left_out`."""
    try:
        with complete_folder(out, replace=False) as staging:
            for path in folder.iterdir():
                kept = not any(path.match(glob) for glob in (*left_out, MANIFEST))
                if path.is_file() and kept and leads_out(path) is None:
                    shutil.copy2(path, staging / path.name)
            model.save_pretrained(staging)
            if optimizer is not None:
                torch.save(optimizer.state_dict(), staging / OPTIMIZER)
    except FileExistsError as error:  # it came while the model was made
        raise InputError(_EXISTS.format(out)) from error
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"cannot write {out}: {reason}") from error
