# SPDX-License-Identifier: Apache-2.0
"""The package of the software GPU, wherever these tests run; numpy is all they need beside it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "softgpu" / "python"))
