# SPDX-License-Identifier: Apache-2.0
"""Whether a run can go on from what is in its folder: the files of a checkpoint, and their schemas.

`format` in a run's config.json is the version of all files of the run.
"""

import contextlib
from pathlib import Path
from typing import Annotated, Any, TypedDict

from rich.console import Console
from safetensors import SafetensorError, safe_open

from unipool import schema
from unipool.errors import InputError, first_line
from unipool.files import folder_fault, latest_checkpoint, step_of
from unipool.model_folder import INDEX, WEIGHTS
from unipool.schema import Range, Text
from unipool.terminal import say

WINDOW = "log_window.json"
TRAINER_STATE = "trainer_state.json"
DATA_KEY = "data.key"
# Without one of these a run would go on as another: with new moments, another rate or order.
_PARTS = ("config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINER_STATE, WINDOW)
_NEW_RUN = "start a new run, or put back the file that was there"

Count = Annotated[int, Range(min=0)]
Key = Annotated[str, Text("[0-9a-f]{64}", "64 hexadecimal digits")]


class _SilentTokens(TypedDict, total=False):
    silent: list[Count]  # of each layer: tokens that no expert got
    routed: Count  # tokens that a layer saw


class Window(_SilentTokens):
    """Sums over the steps since the last row of metrics.jsonl."""

    loss: float
    last_logged: Count
    steps: Count
    seconds: Annotated[float, Range(min=0)]
    terms: dict[str, float]


class TrainerState(TypedDict, total=False):
    """What transformers keeps of a training; other versions of it may keep less."""

    global_step: Count
    max_steps: Count
    epoch: float | None
    logging_steps: float
    eval_steps: float
    save_steps: float
    train_batch_size: Count | None
    num_train_epochs: Count
    num_input_tokens_seen: Any
    total_flos: float
    log_history: list[dict[str, Any]]
    best_metric: float | None
    best_global_step: Count | None
    best_model_checkpoint: str | None
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_hyper_param_search: bool
    trial_name: str | None
    trial_params: Any
    stateful_callbacks: dict[str, Any]


def checkpoint_fault(path: Path, checksums: bool = True) -> str | None:
    """Why no run can go on from the checkpoint `path`, in a few words; None if one can."""
    if fault := folder_fault(path, checksums):
        return fault
    for name in _PARTS:
        if not (path / name).is_file():
            return f"{name} is missing"
    if not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return f"{WEIGHTS} is missing"
    try:
        schema.read(path / WINDOW, Window, "")
        state = schema.read(path / TRAINER_STATE, TrainerState, "")
    except InputError as error:
        return str(error).rstrip("; ")
    if state.get("global_step") != step_of(path):
        return f"{TRAINER_STATE} is of step {state.get('global_step')}"
    return None


def last_usable(checkpoints: Path, console: Console) -> Path | None:
    """The newest complete checkpoint; newer, damaged ones are renamed and count no more."""
    damaged: list[Path] = []

    def passed_over(path: Path, fault: str) -> None:
        say(f"warning: checkpoint {path} is passed over: {fault}", console)
        damaged.append(path)

    found = latest_checkpoint(checkpoints, passed_over, checkpoint_fault)
    for path in damaged:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f"damaged-{path.name}"))
    return found


def read_key(run: Path) -> str | None:
    """The key of the text that a run was begun on; None without one. InputError for no key."""
    path = run / DATA_KEY
    try:
        key = path.read_text(encoding="utf-8", errors="replace").strip()
        schema.check(key, Key)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; {_NEW_RUN}") from error
    return key


def check_weights(checkpoint: Path, model) -> None:
    """InputError unless the checkpoint has each weight of `model`, and in its shape."""
    saved = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                saved |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as weights: {first_line(error)}") from error
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name not in saved and not (tied and name == "lm_head.weight"):
            raise InputError(f"{checkpoint} lacks the weight {name}; remove the checkpoint")
        if name in saved and list(saved[name]) != list(tensor.shape):
            raise InputError(
                f"{checkpoint}: the weight {name} must be {list(tensor.shape)}, got "
                f"{list(saved[name])}; remove the checkpoint"
            )


def check_restored(optimizer, scheduler, step: int, checkpoint: Path) -> None:
    """InputError unless AdamW and the learning rate are those after `step` steps."""
    problem = f"{checkpoint}/optimizer.pt is not the optimizer after step {step} of this model"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            moments = [state.get("exp_avg"), state.get("exp_avg_sq")]
            shapes = [getattr(moment, "shape", None) for moment in moments]
            if shapes != [parameter.shape] * 2 or float(state.get("step", -1)) != step:
                raise InputError(f"{problem}; remove the checkpoint")
    if scheduler.state_dict().get("last_epoch") != step:
        raise InputError(f"{checkpoint}/scheduler.pt is not of step {step}; remove the checkpoint")
