# SPDX-License-Identifier: Apache-2.0
"""What only some systems have is used where it is there: files, locks, signals, sizes of memory."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.any_device
CODE = """
import os, pathlib, signal, sys
sys.modules["fcntl"] = None
for name in ("sched_getaffinity", "O_NOFOLLOW", "O_CLOEXEC"):
    delattr(os, name)
del signal.SIGHUP
usual = os.sysconf
def sysconf(name):
    if name in ("SC_AVPHYS_PAGES", *sys.argv[1:]):
        raise ValueError("unrecognized configuration name")
    return usual(name)
os.sysconf = sysconf
import torch
from unipool.errors import InputError
from unipool.files import open_own
from unipool.models.memory import memory_of
from unipool.nn.pool_pass import default_window_bytes
from unipool.training.callbacks import StopSignals
from unipool.training.run import locked
assert default_window_bytes(torch.device("cpu")) >= 1 << 28
pathlib.Path.read_text = lambda *_, **__: (_ for _ in ()).throw(OSError("no /proc"))
assert memory_of("cpu") >= 1 << 28
with StopSignals() as signals, locked(pathlib.Path("run")):
    assert signals.received is None
pathlib.Path("link").symlink_to("elsewhere")
try:
    open_own(pathlib.Path("link"), "w")
except OSError:
    print("no link is followed")
"""


@pytest.mark.parametrize("missing", [(), ("SC_PHYS_PAGES",)], ids=["macos", "neither"])
def test_without_what_linux_has(tmp_path, missing):
    run = subprocess.run(
        [sys.executable, "-c", CODE, *missing], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "no link is followed\n"
    assert not (tmp_path / "elsewhere").exists()
