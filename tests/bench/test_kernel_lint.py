# SPDX-License-Identifier: Apache-2.0
"""make kernels as a check: made-up logs and object files that break each rule, and the real ones
where they were compiled."""

import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

import cubin  # noqa: E402
import kernel_rules  # noqa: E402
import kernel_table  # noqa: E402
from kernel_facts import Kernel, Tile, parse, read_tiles, with_object_files  # noqa: E402
from kernel_rules import BLOCK_SHARED, check  # noqa: E402

TILES = read_tiles(BLOCK_SHARED)
BY_NAME = {tile.name: tile for tile in TILES}
KIB = 1024


# --- made-up builds


def log_of(
    symbol: str = "_Z6kernelPf", architecture: str = "sm_80", used: str = "Used 40 registers"
) -> str:
    return (
        f"ptxas info    : Compiling entry function '{symbol}' for '{architecture}'\n"
        f"ptxas info    : Function properties for {symbol}\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        f"ptxas info    : {used}\n"
    )


def elf(parts: dict[str, tuple[bytes, int]]) -> bytes:
    """A file of these sections: name -> (content, index of the section it links to)."""
    parts = {"": (b"", 0), **parts, ".shstrtab": (b"", 0)}
    names = b"".join(name.encode() + b"\0" for name in parts)
    parts[".shstrtab"] = (names, 0)
    body, headers, name_at = bytes(64), b"", 0
    for name, (content, link) in parts.items():
        place = (name_at, 1, 0, 0, len(body), len(content), link, 0, 1, 0)
        headers += struct.pack("<IIQQQQIIQQ", *place)
        body += content
        name_at += len(name) + 1
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    numbers = struct.pack("<HHIQQQIHHHHHH", 1, 190, 1, 0, 0, len(body), 0, 64, 0, 0, 64, len(parts),
                          len(parts) - 1)  # fmt: skip
    return ident + numbers + body[64:] + headers


def sized(attribute: int, *values: int) -> bytes:
    return struct.pack(f"<BBH{len(values)}I", 4, attribute, 4 * len(values), *values)


def cubin_of(name: str, shared: int = 512, parameters: int = 72) -> bytes:
    info = sized(0x05, 128, 1, 1) + struct.pack("<BBH", 3, 0x19, parameters)
    info += struct.pack("<BBH", 2, 0x4C, 3)
    symbol = struct.pack("<IBBHQQ", 1, 0, 0, 0, 0, 0)
    return elf(
        {
            ".strtab": (b"\0" + name.encode() + b"\0", 0),
            ".symtab": (bytes(24) + symbol, 1),
            ".nv.info": (sized(0x2F, 1, 168) + sized(0x11, 1, 24), 2),
            f".nv.info.{name}": (info, 2),
            f".nv.shared.{name}": (bytes(shared), 0),
        }
    )


def ptx_of(name: str) -> bytes:
    return (
        ".version 9.0\n.target sm_80\n.extern .shared .align 128 .b8 dynamic_bytes[];\n"
        f".visible .entry {name}(\n)\n.maxntid 128\n.minnctapersm 3\n"
        "{\nmov.u32 %r1, dynamic_bytes;\n}\n.visible .entry other()\n{\nret;\n}\n"
    ).encode()


def fat_binary(*parts: tuple[int, int, bytes], compressed: int = 0) -> bytes:
    """Of (kind, architecture, content)."""
    body = b""
    for kind, architecture, content in parts:
        content += bytes(-len(content) % 8)
        head = struct.pack("<HHIQIIIIQQQQ", kind, 0, 64, len(content), compressed, 0, 0,
                           architecture, 0, 0, 0, 0)  # fmt: skip
        body += head + content
    return struct.pack("<IHHQ", cubin.FAT_BINARY, 1, 16, len(body)) + body


def object_file(path: Path, fat: bytes) -> Path:
    path.write_bytes(elf({".text": (b"code", 0), ".nv_fatbin": (fat, 0)}))
    return path


# --- what is read


def test_log() -> None:
    symbol = "_ZN7unipool12_GLOBAL__N_16kernelIfEEvv"
    used = "Used 255 registers, used 2 barriers, 1024 bytes smem, 360 bytes cmem[0]"
    first, second = parse("ninja: noise\n" + log_of(symbol, used=used) + log_of())
    assert first == Kernel("kernel<float>", "sm_80", 255, 1024, 16, 20, 2)
    assert first.base_name == "kernel"
    assert (second.registers, second.shared_bytes, second.barriers) == (40, 0, 0)


def test_object_file(tmp_path: Path) -> None:
    parts = [
        (cubin.CUBIN, 80, cubin_of("k", shared=512)),
        (cubin.PTX, 80, ptx_of("k")),
        (cubin.CUBIN, 90, cubin_of("k", shared=1536, parameters=5224)),
    ]
    # The linker leaves several fat binaries in a library, one after another.
    fat = fat_binary(*parts[:2]) + bytes(8) + fat_binary(parts[2])
    found = cubin.read(object_file(tmp_path / "a.o", fat))
    assert found["k", 80] == cubin.Resources(168, 128, 3, 72, 512, True, 24, 3)
    assert found["other", 80] == cubin.Resources()
    # On sm_90 the first 1,024 bytes are the system's.
    assert (found["k", 90].shared_bytes, found["k", 90].parameter_bytes) == (512, 5224)


def test_compressed_code_is_refused(tmp_path: Path) -> None:
    path = object_file(tmp_path / "a.o", fat_binary((cubin.CUBIN, 80, b""), compressed=7))
    with pytest.raises(ValueError, match=r"a\.o: its device code is compressed"):
        cubin.read(path)


def test_log_and_object_files_together(tmp_path: Path) -> None:
    path = object_file(tmp_path / "a.o", fat_binary((cubin.CUBIN, 80, cubin_of("_Z6kernelPf"))))
    (kernel,) = with_object_files(parse(log_of()), [path])
    assert (kernel.parameter_bytes, kernel.max_threads) == (72, 128)
    with pytest.raises(ValueError, match=r"kernel \(sm_90a\): in none"):
        with_object_files(parse(log_of(architecture="sm_90a")), [path])


def test_tiles_are_those_of_the_source() -> None:
    _C = pytest.importorskip("unipool._C")
    listed = [(t["name"], t["shared_bytes"], tuple(t["warps"])) for t in _C.gemm_tiles()]
    assert [(t.name, t.pipeline_bytes, t.warps) for t in TILES] == listed
    for gpu in kernel_rules.GPUS:
        named = _C.choose_gemm_tile(
            "rows", 10**6, 8, 4096, 4096, arch=gpu.capability, shared_bytes=gpu.block_shared
        )
        assert gpu.capability in BY_NAME[named].chosen_on


# --- rules

GOOD = Kernel("kernel<float>", "sm_80", 128, max_threads=256, parameter_bytes=72)


def kernel_of(tile: Tile, name: str = "product_kernel", **facts: object) -> Kernel:
    numbers = ", ".join(map(str, tile.shape[1:]))
    kind = {2: "__half", 4: "float"}[tile.element_bytes]
    facts = {"registers": 128, "max_threads": 128, "parameter_bytes": 72, **facts}
    full = f"{name}<Tile<{kind}, {numbers}, (Major)0, (Major)1>, true>"
    return Kernel(full, facts.pop("architecture", "sm_80"), **facts)


def test_good_kernels_pass() -> None:
    large = replace(GOOD, name="fill_rows_kernel", parameter_bytes=5224)
    full = replace(GOOD, registers=64, max_threads=1024)
    assert check([GOOD, large, full, *map(kernel_of, TILES)], TILES) == []


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"spill_bytes": 8}, "8 bytes spilled, limit 0"),
        ({"stack_bytes": 24}, "24 bytes of stack, limit 0"),
        ({"barriers": 17}, "17 barriers, limit 16"),
        (
            {"shared_bytes": 48 * KIB + 4},
            "49,156 bytes of static shared memory, limit 49,152",
        ),
        (
            {"parameter_bytes": 4100},
            "4,100 bytes of parameters, limit 4,096 for a kernel that does not state its need of "
            "CUDA 12.1",
        ),
        (
            {"name": "fill_rows_kernel", "parameter_bytes": 32768},
            "32,768 bytes of parameters, limit 32,764",
        ),
        (
            {"registers": 65, "max_threads": 1024},
            "65 registers x 1,024 threads: 73,728 registers of a block, limit 65,536",
        ),
        (
            {"registers": 129, "min_blocks": 2},
            "129 registers x 256 threads: 69,632 registers of 2 blocks, limit 65,536",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_limit(facts: dict, complaint: str) -> None:
    kernel = replace(GOOD, **facts)
    assert check([kernel], TILES) == [f"{kernel.name} (sm_80): {complaint}"]


def test_limits_are_reached_without_complaint() -> None:
    facts = {"barriers": 16, "shared_bytes": 48 * KIB, "parameter_bytes": 4096}
    assert check([replace(GOOD, **facts)], TILES) == []
    assert check([replace(GOOD, stack_bytes=64, spill_bytes=64)], TILES, max_stack=64) == []


def test_kernel_without_launch_bounds() -> None:
    (line,) = check([replace(GOOD, registers=40, max_threads=None)], TILES)
    assert (
        line == "kernel<float> (sm_80): no __launch_bounds__: 40 registers a thread, of any block"
    )
    assert len(check([replace(GOOD, registers=72, max_threads=None)], TILES)) == 2


def test_static_and_dynamic_shared_memory_together() -> None:
    """The least of the limits where the tile may be chosen: 99 KiB on sm_86, sm_89 and sm_120."""
    tile = BY_NAME["t32"]
    room = 99 * KIB - tile.launch_bytes
    assert check([kernel_of(tile, shared_bytes=room)], TILES) == []
    lines = check([kernel_of(tile, shared_bytes=room + 4)], TILES)
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["sm_86", "sm_89", "sm_120"]
    assert lines[0].endswith(
        f"(sm_80): {room + 4:,} static + 94,208 dynamic bytes of shared memory of tile t32, limit "
        "101,376 on sm_86"
    )


def test_code_of_sm_90a_is_held_to_the_limit_of_an_h100_only() -> None:
    tile = BY_NAME["t32"]
    assert check([kernel_of(tile, architecture="sm_90a", shared_bytes=8 * KIB)], TILES) == []


def test_a_tile_that_is_not_chosen_somewhere_may_be_larger() -> None:
    large = replace(BY_NAME["t32"], launch_bytes=120 * KIB, chosen_on=(80, 90, 100))
    others = [BY_NAME["t16"], BY_NAME["f32"]]
    assert check([kernel_of(large)], [large, *others]) == []
    (line,) = check([kernel_of(replace(large, m=48))], [large, *others])
    assert line.endswith("(sm_80): its tile is not in the table of tiles")


def test_gpus_without_a_tile_are_named() -> None:
    lines = check([], [replace(BY_NAME["t16"], chosen_on=(80, 86, 89, 90, 100)), BY_NAME["f32"]])
    assert lines == [
        "no tile for operands of 2 bytes (sm_120): the least takes 86,016 bytes of shared memory, "
        "limit 101,376"
    ]


def test_promised_blocks_against_shared_memory() -> None:
    (line,) = check([kernel_of(BY_NAME["t32"], min_blocks=3)], TILES)
    assert line.endswith(
        "registers are saved for 3 blocks per multiprocessor, but shared memory of tile t32 "
        "holds 2, on any GPU"
    )
    assert check([kernel_of(BY_NAME["t16"], min_blocks=3)], TILES) == []


# --- the program


def run(log: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "profiling" / "kernel_table.py", log, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_program(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        log_of() + "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async\n"
    )
    fat = fat_binary((cubin.CUBIN, 80, cubin_of("_Z6kernelPf", parameters=5000)))
    objects = object_file(tmp_path / "a.o", fat)
    got = run(log, "--objects", objects, "--json", tmp_path / "table.json")
    assert got.returncode == 1
    assert got.stderr.splitlines() == [
        "kernel (sm_80): 20 bytes spilled, limit 0",
        "kernel (sm_80): 16 bytes of stack, limit 0",
        "kernel (sm_80): 5,000 bytes of parameters, limit 4,096 for a kernel that does not "
        "state its need of CUDA 12.1",
        "ptxas C7510: wgmma was serialised",
    ]
    assert got.stdout.endswith("1 instances checked, 4 findings\n")
    assert '"parameter_bytes": 5000' in (tmp_path / "table.json").read_text()
    log.write_text(log_of())
    assert run(log, "--max-spill", 20).returncode == 0
    log.write_text("nothing\n")
    assert "no kernels found; was it built with -Xptxas=-v?" in run(log).stderr


def test_one_line_of_a_template_has_the_greatest_figures() -> None:
    kernels = [GOOD, replace(GOOD, name="kernel<int>", registers=200, parameter_bytes=8)]
    ((row, count),) = kernel_table.merge(kernels)
    assert (row.name, row.registers, row.parameter_bytes, count) == ("kernel", 200, 72, 2)


OBJECTS = sorted((ROOT / "build" / "kernels").rglob("*.cu.o"))


@pytest.mark.skipif(not OBJECTS, reason="make kernels has not run")
def test_the_compiled_kernels() -> None:
    kernels = parse((ROOT / "build" / "kernels" / "log.txt").read_text())
    assert check(with_object_files(kernels, OBJECTS), TILES) == []
