# SPDX-License-Identifier: Apache-2.0
"""Files of results: whether they can be written, and numbers as JSON."""

import json
import os
from pathlib import Path

from unipool.errors import InputError
from unipool.files import write_text


def check_writable(file: Path | None) -> None:
    """InputError unless `file`, and its folder if there is none yet, can be made; makes nothing."""
    if file is None:
        return
    folder = Path(file).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {file}: {folder} is not a folder that can be written to")
    if file.is_dir():
        raise InputError(f"cannot write {file}: it is a folder")


def write_json(file: Path, numbers: dict) -> None:
    """Replace `file` by `numbers`; its folder is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(numbers, indent=1) + "\n")
