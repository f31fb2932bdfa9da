# SPDX-License-Identifier: Apache-2.0
"""Damage to files, for readers that must notice it."""

from pathlib import Path


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
