# SPDX-License-Identifier: Apache-2.0
"""What the tests of `unipool compare` share."""

import json
from pathlib import Path

TRAINING = ["--seq-len=32", "--batch-size=4", "--steps=6", "--eval-tokens=512", "--device=cpu"]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
