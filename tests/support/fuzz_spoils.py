# SPDX-License-Identifier: Apache-2.0
"""Ways to change a call of an op at random. Each changes the arguments in place and says what it
did; whether the call is still valid is for fuzz_rules.py to tell."""

import math
import random
from collections.abc import Callable

import torch
from fuzz_rules import Rule
from torch import Tensor

DTYPES = (
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int8),
    *(torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn),
)
INTEGERS = (
    *(-(2**63) - 1, -(2**63), -(2**31), -1, 0, 1, 2, 3, 15, 16, 17, 2**15, 2**31 - 1, 2**31),
    *(2**32, 2**32 + 1, 2**33, 2**61, 2**62 + 1, 2**63 - 1, 2**63),
)
REALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 0.25, 1.0, 2.0)
IDS = (-(2**31), -2, -1, 0, 1, 2, 7, 2**15, 2**31 - 1)
HUGE = (2**31 - 1, 2**31, 2**40, 2**62)


# --- layouts: the same values at other addresses


def plain(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else t


def strided(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, along the last axis."""
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


def offset(t: Tensor) -> Tensor:
    """At the end of a storage, one to three elements after an aligned address."""
    shift = 1 + t.numel() % 3
    memory = torch.empty(t.numel() + shift, dtype=t.dtype)
    memory[shift:] = t.reshape(-1)
    return memory[shift:].view(t.shape)


def negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.is_floating_point() else t


LAYOUTS = (plain, transposed, strided, offset, negated)


# --- spoils


def _pick(arguments: dict, rng: random.Random) -> tuple[str, Callable[[], object], Callable]:
    """An argument, and how to read and to replace it; one tensor of it if it is a list."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        value = arguments[name] = list(value)
        return f"{name}[{index}]", lambda: value[index], lambda v: value.__setitem__(index, v)
    return name, lambda: arguments[name], lambda v: arguments.__setitem__(name, v)


def _tensor(change: Callable[[Tensor, random.Random], Tensor]) -> Callable:
    """A spoil that changes one tensor and leaves what is none alone."""

    def spoil(arguments: dict, rule: Rule, rng: random.Random) -> str:
        name, get, put = _pick(arguments, rng)
        t = get()
        usual = isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"
        usual = usual and t.numel() <= 2**22  # an absurd one stays as it is
        if usual:
            put(change(t, rng))
        return name if usual else "nothing"

    spoil.__name__ = change.__name__
    return spoil


@_tensor
def layout(t: Tensor, rng: random.Random) -> Tensor:
    return rng.choice(LAYOUTS)(t)


@_tensor
def dtype(t: Tensor, rng: random.Random) -> Tensor:
    return t.to(rng.choice(DTYPES))


@_tensor
def shape(t: Tensor, rng: random.Random) -> Tensor:
    axis = rng.randrange(t.dim()) if t.dim() else 0
    changes = [
        lambda: t.unsqueeze(0),
        lambda: t.unsqueeze(-1),
        lambda: t.flatten(),
        lambda: t.flatten()[0] if 0 < t.numel() < 2**22 else t.new_zeros(()),
        lambda: t.mT if t.dim() >= 2 else t,
        lambda: t.narrow(axis, 0, 0) if t.dim() else t,
        lambda: t.narrow(axis, 0, max(t.shape[axis] - 1, 0)) if t.dim() else t,
        lambda: torch.cat([t, t], axis) if t.dim() else t,
    ]
    return rng.choice(changes)()


@_tensor
def expanded(t: Tensor, rng: random.Random) -> Tensor:
    """One slice of stride 0 in the place of an axis, as long as before or absurdly long."""
    if t.dim() == 0 or 0 in t.shape:
        return t
    axis = rng.randrange(t.dim())
    sizes = list(t.shape)
    if rng.random() < 0.4 and t.numel() // t.shape[axis] == 1:
        sizes[axis] = rng.choice(HUGE)
    return t.narrow(axis, 0, 1).expand(sizes)


@_tensor
def special(t: Tensor, rng: random.Random) -> Tensor:
    """NaN, infinities and zeros of both signs in some places, or one in all."""
    if not t.is_floating_point() or t.numel() == 0 or t.numel() > 2**22:
        return t
    if t.dtype == torch.float8_e4m3fn:
        return t
    t = t.clone(memory_format=torch.contiguous_format)
    value = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0])
    for _ in range(rng.choice([1, 1, 3])):
        t.view(-1)[rng.randrange(t.numel())] = value
    return t if rng.random() < 0.9 else torch.full_like(t, value)


@_tensor
def index(t: Tensor, rng: random.Random) -> Tensor:
    if t.dtype != torch.int32 or t.numel() == 0 or t.numel() > 2**22:
        return t
    t = t.clone().contiguous()
    for _ in range(rng.choice([1, 1, 4])):
        t.view(-1)[rng.randrange(t.numel())] = rng.choice([*IDS, t.numel(), t.numel() - 1])
    return t


@_tensor
def shuffled(t: Tensor, rng: random.Random) -> Tensor:
    """Index values that are all in range and no plan."""
    if t.dtype != torch.int32 or t.numel() > 2**22:
        return t
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape)


@_tensor
def mask_bytes(t: Tensor, rng: random.Random) -> Tensor:
    """Truth as another byte than 1."""
    if t.dtype != torch.bool:
        return t
    return (t.to(torch.uint8) * rng.choice([2, 0x80, 0xFF])).view(torch.bool)


@_tensor
def other_layout(t: Tensor, rng: random.Random) -> Tensor:
    if t.dim() < 2 or t.numel() > 2**22 or t.dtype == torch.float8_e4m3fn:
        return t
    return t.to_sparse()


@_tensor
def on_meta(t: Tensor, rng: random.Random) -> Tensor:
    return t.to("meta")


def all_on_meta(arguments: dict, rule: Rule, rng: random.Random) -> str:
    for name, value in arguments.items():
        moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), value)
        arguments[name] = moved
    return "all"


@_tensor
def wants_grad(t: Tensor, rng: random.Random) -> Tensor:
    return t.detach().requires_grad_() if t.is_floating_point() or t.is_complex() else t


def scalar(arguments: dict, rule: Rule, rng: random.Random) -> str:
    kinds = {"int": INTEGERS, "real": REALS, "flag": (True, False), "dtype": (None, *DTYPES)}
    names = [n for n, text in rule.parameters.items() if text in kinds]
    if not names:
        return "nothing"
    name = rng.choice(names)
    arguments[name] = rng.choice(kinds[rule.parameters[name]])
    return f"{name} = {arguments[name]}"


def stranger(arguments: dict, rule: Rule, rng: random.Random) -> str:
    """No tensor, or no number, in the place of one."""
    name, _, put = _pick(arguments, rng)
    value = rng.choice([None, 1, 2.5, "2", [], [1, 2], {}, object()])
    put(value)
    return f"{name} = {type(value).__name__}"


def segments(arguments: dict, rule: Rule, rng: random.Random) -> str:
    """A list that is too long, too short or empty."""
    names = [n for n, v in arguments.items() if isinstance(v, list)]
    if not names:
        return "nothing"
    name = rng.choice(names)
    value = arguments[name]
    arguments[name] = rng.choice([[], value[:1], value[1:], value + value])
    return name


def overlapping(arguments: dict, rule: Rule, rng: random.Random) -> str:
    """One argument in the memory of another, values and all. Of another type only where the op
    writes one of them: else its values are near the smallest there are, and ties all over."""
    usual = {
        n: t for n, t in arguments.items()
        if isinstance(t, Tensor) and t.device.type == "cpu" and t.layout == torch.strided
    }  # fmt: skip
    if len(usual) < 2:
        return "nothing"
    name, other = rng.sample(list(usual), 2)
    t = usual[name]
    begin = rng.choice([0, 0, 1, 5])
    memory = usual[other].detach()
    if memory.dtype != t.dtype and rule.written not in (name, other):
        return "nothing"
    if memory.numel() > 2**22 or not memory.is_contiguous() or memory.is_neg():
        return "nothing"
    whole = memory.view(-1).view(torch.uint8)
    begin, size = begin * t.element_size(), t.numel() * t.element_size()
    aligned = (whole.storage_offset() + begin) % t.element_size() == 0
    if begin + size > whole.numel() or not aligned or t.numel() == 0:
        return "nothing"
    arguments[name] = whole[begin : begin + size].view(t.dtype).view(t.shape)
    return f"{name} in {other}"


SPOILS = (
    *(layout, layout, dtype, shape, shape, expanded, special, special, index, index, shuffled),
    *(mask_bytes, other_layout, on_meta, all_on_meta, wants_grad, scalar, scalar, stranger),
    *(segments, overlapping, overlapping),
)
