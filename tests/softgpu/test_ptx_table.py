# SPDX-License-Identifier: Apache-2.0
"""Every opcode that the interpreter knows is tested, and every one that is shipped is known."""

import os
import re
from pathlib import Path

import pytest
from ptx_kernels import HEAD, needs_build

from softgpu import coverage, ptx

pytestmark = needs_build

HERE = Path(__file__).parent
LIBRARY = Path(os.environ.get("UNIPOOL_LIBRARY_DIR", "")) / "libunipool_cuda.so"


# An opcode as it stands in PTX, or a name that a test puts its modifiers to.
USE = r"""(?<![\w.%]){}(\.[a-z{{]|;| \d;| [%L{{a-z(]|",|":|\.|"\])"""


def test_every_opcode_has_a_test():
    files = [p for p in HERE.glob("test_ptx_*.py") if p != Path(__file__)]
    tests = "\n".join(p.read_text() for p in files)
    assert [n for n in sorted(ptx.known_opcodes()) if not re.search(USE.format(n), tests)] == []


def test_known_opcodes_are_those_of_the_table():
    known = ptx.known_opcodes()
    assert {"add", "mma", "call", "redux"} <= known
    for opcode in ("wgmma", "mbarrier", "tcgen05", "vadd"):
        assert opcode not in known
        text = f"{HEAD}.visible .entry k()\n{{ {opcode}.u32; ret; }}"
        with pytest.raises(ptx.PtxError, match=f"unknown opcode {opcode}"):
            coverage.inventory(text)


@pytest.mark.skipif(not LIBRARY.is_file(), reason="UNIPOOL_LIBRARY_DIR has no libunipool_cuda.so")
def test_every_shipped_opcode_is_known():
    """Parsing refuses an opcode, a modifier, a register or a directive that is not known."""
    texts = ptx.of_library(LIBRARY)
    assert texts, "no PTX: build with nvcc --compress-mode=none"
    found = set()
    for _, text in texts:
        kernels = coverage.inventory(text)
        assert len(kernels) == text.count(".entry ")
        found |= ptx.opcodes(text)
    assert len(found) > 100
    assert {opcode.split(".")[0] for opcode in found} <= ptx.known_opcodes()


def test_opcodes_of_a_text():
    text = HEAD + ".visible .entry k()\n{ .reg .b32 %r<2>;\n$L: @!%p1 add.s32 %r0, %r1, 1; // sub"
    text += "\n.loc 1 2 3\nbar.sync 0;\nld.global.L2::128B.u32 %r0, [%rd1];\nret;\n}"
    assert ptx.opcodes(text) == {"add.s32", "bar.sync", "ld.global.L2::128B.u32", "ret"}
