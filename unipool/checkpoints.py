# SPDX-License-Identifier: Apache-2.0
"""Which folder holds the model of a run, of a checkpoint of one, or of Hugging Face."""

from pathlib import Path

from unipool.errors import InputError
from unipool.files import MANIFEST, folder_fault, latest_checkpoint, step_of
from unipool.model_folder import INDEX, WEIGHTS, check_model_folder, check_path

ALLOWED = "a run folder, a complete checkpoint of one, or a Hugging Face model folder"


def find_model(path: Path, trust_remote_code: bool = False) -> Path:
    """The folder to load: `path` itself, or the model or newest checkpoint of a run folder.

    Raises InputError, in one line, for what is no model, is damaged, or asks to run code of its own
    that is not trusted.
    """
    path = Path(path)
    check_path(path, "model:")
    try:
        found = path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"model: {path}: {error.strerror}") from error
    if not found:
        raise InputError(f"model: {path} is not a folder")
    if (path / "model").is_dir():
        path = path / "model"
    elif newest := latest_checkpoint(path / "checkpoints"):
        path = newest
    if not (path / INDEX).exists() and not (path / WEIGHTS).exists():
        raise InputError(f"model: {path} holds neither a model nor a run with a checkpoint")
    if (path / MANIFEST).exists() and (fault := folder_fault(path)):
        raise InputError(f"model: {path} is damaged: {fault}")
    check_model_folder(path, trust_remote_code)
    return path


def checked_model(checkpoint: Path, trust_remote_code: bool = False) -> Path:
    """As find_model, but what a run wrote must have the manifest that vouches for it."""
    path = Path(checkpoint)
    try:
        folder = find_model(path, trust_remote_code)
    except InputError as error:
        raise InputError(f"{error}; give {ALLOWED}") from error
    from_run = step_of(folder) >= 0 or (folder.parent / "data.key").exists()
    if from_run and not (folder / MANIFEST).exists():
        raise InputError(f"model: {folder} is incomplete: {folder_fault(folder)}; give {ALLOWED}")
    return folder
