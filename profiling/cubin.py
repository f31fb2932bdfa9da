# SPDX-License-Identifier: Apache-2.0
"""Facts about kernels from object files and libraries that nvcc wrote with --compress-mode=none.

Such a file holds fat binaries: cubins (ELF, one for each architecture), which say what a block of a
kernel takes, and PTX, which keeps what the source asked for with __launch_bounds__.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FAT_BINARY = 0xBA55ED50
PTX, CUBIN = 1, 2  # kinds of a part
# Attributes of .nv.info sections.
MAX_THREADS, PARAMETER_BYTES, BARRIERS = 0x05, 0x19, 0x4C  # of .nv.info.KERNEL
FIELDS = {0x2F: "registers", 0x11: "stack_bytes"}  # of .nv.info, with a symbol
SIZED = 4  # the format of an attribute whose value is the number of bytes that follow
# From sm_90 on a kernel's section of shared memory begins with what the system keeps for itself.
RESERVED_SHARED, FIRST_WITH_RESERVED = 1024, 90


@dataclass
class Resources:
    """What a block of a kernel takes; None: not stated."""

    registers: int | None = None  # a thread
    max_threads: int | None = None  # of __launch_bounds__
    min_blocks: int | None = None  # a multiprocessor, of __launch_bounds__
    parameter_bytes: int = 0
    shared_bytes: int = 0  # static
    dynamic_shared: bool = False  # whether it has an array of as many bytes as its launch names
    stack_bytes: int = 0
    barriers: int = 0


@dataclass(frozen=True)
class Part:
    kind: int
    architecture: int
    compressed: bool
    content: bytes


@dataclass(frozen=True)
class Section:
    name: str
    content: bytes
    size: int  # also of what has no content
    link: int


def sections(elf: bytes) -> list[Section]:
    """Of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry, count, names_at = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQII", elf, table + i * entry) for i in range(count)]
    names = headers[names_at][4]
    found = []
    for name, kind, _, _, offset, size, link, _ in headers:
        nobits = kind == 8
        content = b"" if nobits else elf[offset : offset + size]
        found.append(Section(_text(elf, names + name), content, size, link))
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def parts(fat_binaries: bytes) -> Iterator[Part]:
    """Of all fat binaries in a section .nv_fatbin, one after another with zeros between."""
    at = 0
    while at + 16 <= len(fat_binaries):
        magic, _, header, size = struct.unpack_from("<IHHQ", fat_binaries, at)
        if magic != FAT_BINARY:
            at += 8
            continue
        part, end = at + header, at + header + size
        while part < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", fat_binaries, part)
            (compressed_size,) = struct.unpack_from("<I", fat_binaries, part + 16)
            (architecture,) = struct.unpack_from("<I", fat_binaries, part + 28)
            content = fat_binaries[part + header : part + header + size]
            yield Part(kind, architecture, compressed_size != 0, content)
            part += header + size
        at = end


def attributes(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(attribute, its 16-bit value, what follows) of a section .nv.info."""
    at = 0
    while at + 4 <= len(content):
        form, attribute, value = struct.unpack_from("<BBH", content, at)
        size = value if form == SIZED else 0
        yield attribute, value, content[at + 4 : at + 4 + size]
        at += 4 + size


def _symbol_names(found: list[Section], info: Section) -> list[str]:
    symbols = found[info.link]
    strings = found[symbols.link].content
    return [
        _text(strings, struct.unpack_from("<I", symbols.content, at)[0])
        for at in range(0, len(symbols.content), 24)
    ]


def read_cubin(cubin: bytes, architecture: int, kernels: dict[str, Resources]) -> None:
    """Adds what a cubin says to `kernels`, by mangled name."""
    found = sections(cubin)
    reserved = RESERVED_SHARED if architecture >= FIRST_WITH_RESERVED else 0
    here = {}
    for section in found:
        if name := _after(".nv.info.", section.name):
            here[name] = kernels.setdefault(name, Resources())
            _read_kernel_info(section, here[name])
    for section in found:
        if (name := _after(".nv.shared.", section.name)) in here:
            here[name].shared_bytes = max(0, section.size - reserved)
        if section.name == ".nv.info":  # of functions too
            names = _symbol_names(found, section)
            for attribute, _, more in attributes(section.content):
                if attribute in FIELDS:
                    symbol, value = struct.unpack("<II", more)
                    if names[symbol] in here:
                        setattr(here[names[symbol]], FIELDS[attribute], value)


def _after(prefix: str, text: str) -> str | None:
    return text.removeprefix(prefix) if text.startswith(prefix) else None


def _read_kernel_info(section: Section, kernel: Resources) -> None:
    for attribute, value, more in attributes(section.content):
        if attribute == MAX_THREADS:
            x, y, z = struct.unpack("<III", more)
            kernel.max_threads = x * y * z
        elif attribute == PARAMETER_BYTES:
            kernel.parameter_bytes = value
        elif attribute == BARRIERS:
            kernel.barriers = value & 0xFF


ENTRY = re.compile(r"\.entry (\w+)\(")
MIN_BLOCKS = re.compile(r"\.minnctapersm (\d+)")
DYNAMIC = re.compile(r"\.extern \.shared [^;]*?(\w+)\[\];")


def read_ptx(ptx: str, kernels: dict[str, Resources]) -> None:
    """Adds the blocks that __launch_bounds__ asked for, and the use of dynamic shared memory."""
    dynamic = DYNAMIC.findall(ptx)
    starts = list(ENTRY.finditer(ptx))
    ends = [match.start() for match in starts[1:]] + [len(ptx)]
    for match, end in zip(starts, ends, strict=True):
        body = ptx[match.end() : end]
        kernel = kernels.setdefault(match.group(1), Resources())
        if blocks := MIN_BLOCKS.search(body):
            kernel.min_blocks = int(blocks.group(1))
        kernel.dynamic_shared = any(re.search(rf"\b{name}\b", body) for name in dynamic)


def read(path: Path) -> dict[tuple[str, int], Resources]:
    """By mangled name and architecture (80, 90), of all kernels in an object file or library."""
    by_architecture: dict[int, dict[str, Resources]] = {}
    for section in sections(path.read_bytes()):
        if section.name != ".nv_fatbin":
            continue
        for part in parts(section.content):
            if part.compressed:
                raise ValueError(f"{path}: its device code is compressed (--compress-mode=none)")
            kernels = by_architecture.setdefault(part.architecture, {})
            if part.kind == CUBIN:
                read_cubin(part.content, part.architecture, kernels)
            elif part.kind == PTX:
                read_ptx(part.content.split(b"\0", 1)[0].decode(), kernels)
    return {(k, arch): r for arch, found in by_architecture.items() for k, r in found.items()}
