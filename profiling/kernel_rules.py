# SPDX-License-Identifier: Apache-2.0
"""What would fail at a launch, or run slower than its source promises, told from compiled kernels.

Each rule gives lines that name kernel, architecture, figure and limit. Shared memory of kernels
without a tile depends on the call; the software GPU checks it at every launch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kernel_facts import Kernel, Tile

KIB = 1024
REGISTER_FILE = 64 * KIB  # of a multiprocessor, and the most of a block
WARP, MAX_THREADS, MAX_BARRIERS = 32, 1024, 16
STATIC_SHARED = 48 * KIB  # more has to be dynamic, on every GPU
RESERVED_SHARED = KIB  # of the system, in every block
# Over PARAMETERS only since CUDA 12.1 (and its driver), which these kernels need: they take a list
# of segments by value.
PARAMETERS, LARGE_PARAMETERS = 4096, 32764
NEED_LARGE_PARAMETERS = frozenset({"merge_offsets_kernel", "fill_rows_kernel"})


@dataclass(frozen=True)
class Gpu:
    """Limits by the CUDA programming guide."""

    capability: int
    block_shared: int  # that a block may opt in to
    shared: int  # of a multiprocessor


GPUS = [
    Gpu(80, 163 * KIB, 164 * KIB),
    Gpu(86, 99 * KIB, 100 * KIB),
    Gpu(89, 99 * KIB, 100 * KIB),
    Gpu(90, 227 * KIB, 228 * KIB),
    Gpu(100, 227 * KIB, 228 * KIB),
    Gpu(120, 99 * KIB, 100 * KIB),
]
BLOCK_SHARED = {gpu.capability: gpu.block_shared for gpu in GPUS}


def runs_on(kernel: Kernel, gpu: Gpu) -> bool:
    """Code of an architecture with a letter runs there only; other code, or the PTX beside it, on
    every newer GPU."""
    if kernel.architecture[-1].isalpha():
        return gpu.capability == kernel.capability
    return gpu.capability >= kernel.capability


def block_registers(kernel: Kernel) -> int:
    """Of its largest block: a thread's come in eights, and blocks in whole warps."""
    warps = -(-(kernel.max_threads or MAX_THREADS) // WARP)
    return warps * WARP * (-(-kernel.registers // 8) * 8)


def resident_by_registers(kernel: Kernel) -> int:
    return REGISTER_FILE // block_registers(kernel)


def resident_by_shared_memory(kernel: Kernel, tile: Tile, gpu: Gpu) -> int:
    """With as few experts as there can be."""
    return gpu.shared // (tile.pipeline_bytes + kernel.shared_bytes + RESERVED_SHARED)


def check(kernels: list[Kernel], tiles: list[Tile], max_stack: int = 0) -> list[str]:
    """What is wrong, a line each. max_stack: bytes of stack that a kernel may use, and spill."""
    by_shape = {tile.shape: tile for tile in tiles}
    found: list[str] = []
    for kernel in kernels:
        where = f"{kernel.name} ({kernel.architecture})"
        lines = [*alone(kernel, max_stack)]
        if kernel.tile_shape in by_shape:
            lines += with_tile(kernel, by_shape[kernel.tile_shape])
        elif kernel.tile_shape is not None:
            lines.append("its tile is not in the table of tiles")
        found += [f"{where}: {line}" for line in lines]
    return found + list(without_tile_to_choose(tiles))


def alone(kernel: Kernel, max_stack: int) -> Iterator[str]:
    """Rules that need no tile."""
    limits = [
        ("bytes spilled", kernel.spill_bytes, max_stack),
        ("bytes of stack", kernel.stack_bytes, max_stack),
        ("barriers", kernel.barriers, MAX_BARRIERS),
        ("bytes of static shared memory", kernel.shared_bytes, STATIC_SHARED),
    ]
    for what, figure, limit in limits:
        if figure > limit:
            yield f"{figure:,} {what}, limit {limit:,}"
    if kernel.parameter_bytes is None:
        return
    large = kernel.base_name in NEED_LARGE_PARAMETERS
    limit = LARGE_PARAMETERS if large else PARAMETERS
    if kernel.parameter_bytes > limit:
        why = "" if large else " for a kernel that does not state its need of CUDA 12.1"
        yield f"{kernel.parameter_bytes:,} bytes of parameters, limit {limit:,}{why}"
    if kernel.max_threads is None:
        yield f"no __launch_bounds__: {kernel.registers} registers a thread, of any block"
    yield from _registers(kernel)


def _registers(kernel: Kernel) -> Iterator[str]:
    blocks = max(kernel.min_blocks or 1, 1)
    if blocks * block_registers(kernel) > REGISTER_FILE:
        threads = kernel.max_threads or MAX_THREADS
        of = f"{blocks} blocks" if blocks > 1 else "a block"
        yield (
            f"{kernel.registers} registers x {threads:,} threads: "
            f"{blocks * block_registers(kernel):,} registers of {of}, limit {REGISTER_FILE:,}"
        )


def with_tile(kernel: Kernel, tile: Tile) -> Iterator[str]:
    total = kernel.shared_bytes + tile.launch_bytes
    gpus = [g for g in GPUS if runs_on(kernel, g) and g.capability in tile.chosen_on]
    for gpu in gpus:
        if total > gpu.block_shared:
            yield (
                f"{kernel.shared_bytes:,} static + {tile.launch_bytes:,} dynamic bytes of shared "
                f"memory of tile {tile.name}, limit {gpu.block_shared:,} on sm_{gpu.capability}"
            )
    promised = kernel.min_blocks or 1
    most = max((resident_by_shared_memory(kernel, tile, gpu) for gpu in gpus), default=promised)
    if most < promised:
        yield (
            f"registers are saved for {promised} blocks per multiprocessor, but shared memory of "
            f"tile {tile.name} holds {most}, on any GPU"
        )


def without_tile_to_choose(tiles: list[Tile]) -> Iterator[str]:
    """GPUs on which operands of a size have no tile at all."""
    for gpu in GPUS:
        for size in sorted({tile.element_bytes for tile in tiles}):
            of_size = [tile for tile in tiles if tile.element_bytes == size]
            if not any(gpu.capability in tile.chosen_on for tile in of_size):
                least = min(of_size, key=lambda tile: tile.launch_bytes)
                yield (
                    f"no tile for operands of {size} bytes (sm_{gpu.capability}): the least takes "
                    f"{least.launch_bytes:,} bytes of shared memory, limit {gpu.block_shared:,}"
                )
