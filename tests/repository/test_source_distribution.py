# SPDX-License-Identifier: Apache-2.0
"""The source distribution holds the checkout: what a build and the test suite need, and no more."""

import shutil
import subprocess
import sys
import tarfile

import pytest
from sources import ROOT, tracked

pytestmark = pytest.mark.any_device
MADE = ("PKG-INFO", "setup.cfg")  # and unipool.egg-info/, by setuptools
BUILT = ("build/cmake/log.txt", "unipool/lib/libunipool_cpu.so", "unipool/_C.so", ".venv/built")


def test_it_has_every_file_of_the_checkout_and_nothing_of_a_build(tmp_path):
    """Of a copy, since setuptools fills a folder beside setup.py while it packs."""
    copy, packed = tmp_path / "copy", tmp_path / "packed"
    for name in (*tracked(), *BUILT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if name in BUILT:
            (copy / name).write_text("of a build")
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(packed)]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (archive,) = packed.glob("unipool-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {m.name.partition("/")[2] for m in file.getmembers() if m.isfile()}
    names = {n for n in names if n not in MADE and ".egg-info/" not in n}
    assert names == set(tracked())
