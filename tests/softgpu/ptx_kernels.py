# SPDX-License-Identifier: Apache-2.0
"""Small kernels around a few lines of PTX, and the values that are worth trying."""

import itertools
import re

import numpy as np
import pytest

from softgpu import ptx

needs_build = pytest.mark.skipif(
    not (ptx.LIB / "libcudart.so.13").exists(), reason="softgpu/build.py has not been run"
)

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def module(body: str, params: str = "", *, before: str = "", name: str = "kernel") -> str:
    return f"{HEAD}{before}\n.visible .entry {name}({params}\n)\n{{\n{body}\n}}\n"


def launch(
    body: str,
    *arrays: np.ndarray,
    grid=1,
    block=32,
    before: str = "",
    shared: int = 0,
    settings: str = "",
) -> dict:
    """Runs a body in which %rd0, %rd1, ... are the addresses of the arrays, %t the thread's number,
    and these registers are free: %rs, %r, %rl (64 bits), %f, %fd, %p with numbers below 64."""
    params = ",\n".join(f".param .u64 p{n}" for n in range(len(arrays)))
    registers = """
    .reg .b16 %rs<64>; .reg .b32 %r<64>; .reg .b64 %rl<64>; .reg .b64 %rd<16>;
    .reg .f32 %f<64>; .reg .f64 %fd<64>; .reg .pred %p<64>; .reg .b32 %t, %lane;
    mov.u32 %t, %tid.x;
    mov.u32 %lane, %laneid;
    """
    loads = "".join(f"ld.param.u64 %rd{n}, [p{n}];\n" for n in range(len(arrays)))
    text = module(registers + loads + body + "\nret;", params, before=before)
    return ptx.run_ptx(text, "kernel", grid, block, arrays, shared, settings)


def evaluate(code: str, settings: str = "", **values) -> np.ndarray | tuple[np.ndarray, ...]:
    """Executes a line of PTX once for each element. Arrays are inputs in registers of their names,
    dtypes are outputs (bool: predicates)."""
    inputs = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
    outputs = {k: np.dtype(v) for k, v in values.items() if k not in inputs}
    n = len(next(iter(inputs.values())))
    results = {k: np.zeros(n, np.uint32 if d.kind == "b" else d) for k, d in outputs.items()}
    body = [
        ".reg .pred inside; .reg .b32 %n; .reg .b64 %at, %wide;",
        "mov.u32 %n, %ctaid.x; mad.lo.u32 %n, %n, 128, %t;",
        f"setp.ge.u32 inside, %n, {n}; @inside ret;",
    ]
    store = []
    for number, (name, array) in enumerate({**inputs, **results}.items()):
        bits = 8 * array.itemsize
        predicate = name in inputs and array.dtype.kind == "b"
        place = f"mad.wide.u32 %at, %n, {array.itemsize}, %rd{number};"
        if name in inputs:
            body.append(f".reg .b{max(bits, 16)} {name};" if not predicate else "")
            if predicate:
                body.append(f".reg .pred {name}; .reg .b16 {name}_bits;")
                body.append(f"{place} ld.global.u8 {name}_bits, [%at];")
                body.append(f"setp.ne.u16 {name}, {name}_bits, 0;")
            else:
                body.append(f"{place} ld.global.b{bits} {name}, [%at];")
        elif outputs[name].kind == "b":
            body.append(f".reg .pred {name}; .reg .b32 {name}_bits;")
            store.append(f"selp.u32 {name}_bits, 1, 0, {name};")
            store.append(f"{place} st.global.b32 [%at], {name}_bits;")
        else:
            body.append(f".reg .b{max(bits, 16)} {name};")
            store.append(f"{place} st.global.b{bits} [%at], {name};")
    text = "\n".join([*body, code, *store])
    grid = (n + 127) // 128
    launch(text, *inputs.values(), *results.values(), grid=grid, block=128, settings=settings)
    found = [r.astype(bool) if outputs[k].kind == "b" else r for k, r in results.items()]
    return found[0] if len(found) == 1 else tuple(found)


def same_bits(got: np.ndarray, want: np.ndarray, note: object = "") -> None:
    """Equal to the bit; any NaN is a NaN."""
    got, want = np.asarray(got), np.asarray(want, got.dtype)
    equal = got == want
    if got.dtype.kind == "f":
        bits = np.dtype(f"u{got.itemsize}")
        equal = (got.view(bits) == want.view(bits)) | (np.isnan(got) & np.isnan(want))
    if not equal.all():
        at = int(np.flatnonzero(~equal)[0])
        pytest.fail(f"{note}: element {at}: {got[at]!r}, not {want[at]!r}; {(~equal).sum()} wrong")


def product(*lists: np.ndarray) -> list[np.ndarray]:
    """All combinations of the lists' elements, as one array per list."""
    rows = list(itertools.product(*lists))
    return [np.array([r[n] for r in rows], lists[n].dtype) for n in range(len(lists))]


def signed(bits: int) -> np.ndarray:
    top = 1 << (bits - 1)
    edges = [0, 1, 2, 3, 7, 8, 15, 31, 32, 63, 100, top // 2, top - 1, 0x5A % top]
    return np.array([*edges, *(-e - 1 for e in edges)], f"i{bits // 8}")


def unsigned(bits: int) -> np.ndarray:
    return signed(bits).view(f"u{bits // 8}")


def integers(type_name: str) -> np.ndarray:
    bits = int(type_name[1:])
    return signed(bits) if type_name[0] == "s" else unsigned(bits)


_F32 = [0, 1, 0.5, 1.5, 2.5, 3.5, 1e-45, 1.1e-38, 1.17549435e-38, 3.4028235e38, 1e10, 1 / 3, 0.1]
_F32 += [np.inf, np.nan, 1.0000001, 16777217, 2**31, 2.0**63, 65504, 65519.996, 65520, 6e-8]
F32 = np.array([*_F32, *(-x for x in _F32)], np.float32)
F64 = np.array([*F32.tolist(), 5e-324, 1e300, -1e300, 1 / 3, 2**53 + 1.0])


def all_halves() -> np.ndarray:
    return np.arange(65536, dtype=np.uint32).astype(np.uint16)


def some_halves(seed: int = 0, n: int = 4096) -> np.ndarray:
    """Bits of halves: edges first, then random ones."""
    edges = [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00, 0xBC00]
    edges += [0x7F, 0x80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x3F80, 0xBF80, 0x3F81, 0x3C01]
    rng = np.random.default_rng(seed)
    return np.concatenate([np.array(edges), rng.integers(0, 65536, n - len(edges))]).astype(
        np.uint16
    )


def opcodes_in(text: str) -> set[str]:
    return set(re.findall(r"\b([a-z][a-z0-9]*(?:\.[a-z0-9:_]+)+)\b", text))
