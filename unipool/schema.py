# SPDX-License-Identifier: Apache-2.0
"""What a file that a command reads back must hold: a type says it, `check` compares a value.

    class Row(TypedDict, total=False):
        step: Annotated[int, Range(min=0)]
        loss: float | Literal["nan", "inf", "-inf"]

    read(path, Row, "remove the file to begin anew")

Types are bool, int, float (finite; an int will do), str, None, Any, Literal, unions, list[...],
dict[str, ...] and TypedDict, whose names are all that there may be. Annotated adds a Range or a
Text.
"""

import math
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from unipool.errors import InputError
from unipool.json_files import read_json

_LARGEST = 1 << 62
_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
_NAMES |= {type(None): "null"}


@dataclass(frozen=True)
class Range:
    """Of a number; min belongs to it, above does not."""

    min: float | None = None
    above: float | None = None

    def holds(self, value: float) -> bool:
        low = (self.min is None or value >= self.min) and (self.above is None or value > self.above)
        return low and abs(value) <= _LARGEST

    def __str__(self) -> str:
        return f"at least {self.min}" if self.above is None else f"above {self.above}"


@dataclass(frozen=True)
class Text:
    """What a text must match as a whole."""

    pattern: str
    due: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.due


def read(path: Path, kind: Any, advice: str) -> Any:
    """The JSON in a file; InputError, which ends in `advice`, unless it is of `kind`."""
    try:
        value = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    try:
        check(value, kind)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; {advice}") from error
    return value


def check(value: Any, kind: Any, place: str = "it") -> None:
    """ValueError, in one line, naming the place, unless `value` is of the type `kind`."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is Annotated:
        check(value, parts[0], place)
        for rule in parts[1:]:
            if value is not None and not rule.holds(value):
                raise ValueError(f"{place} must be {rule}, got {_brief(value)}")
    elif origin in (Union, types.UnionType):
        if not any(_is(value, part) for part in parts):
            raise _wrong(place, " or ".join(map(_name, parts)), value)
    elif origin is Literal:
        if not any(value == part and type(value) is type(part) for part in parts):
            raise _wrong(place, "one of " + ", ".join(map(str, parts)), value)
    elif origin is list:
        _check_list(value, parts[0], place)
    elif origin is dict or is_typeddict(kind):
        _check_names(value, kind, place)
    elif not _is_plain(value, kind):
        raise _wrong(place, _name(kind), value)


def _check_list(value: Any, kind: Any, place: str) -> None:
    if not isinstance(value, list):
        raise _wrong(place, "a list", value)
    for number, one in enumerate(value):
        check(one, kind, f"[{number}]" if place == "it" else f"{place}[{number}]")


def _check_names(value: Any, kind: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(place, "names with values", value)
    inside = "" if place == "it" else place + "."
    if get_origin(kind) is dict:
        for name, one in value.items():
            check(one, get_args(kind)[1], inside + name)
        return
    known = get_type_hints(kind, include_extras=True)
    if missing := sorted(kind.__required_keys__ - value.keys()):
        raise ValueError(f"{place} lacks {missing[0]}")
    for name, one in value.items():
        if name not in known:
            raise ValueError(f"{place} has the unknown name {name[:80]!r}")
        check(one, known[name], inside + name)


def _is(value: Any, kind: Any) -> bool:
    try:
        check(value, kind)
    except ValueError:
        return False
    return True


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is float:
        if type(value) is int:
            return abs(value) <= _LARGEST
        return type(value) is float and math.isfinite(value)
    return value is None if kind in (None, type(None)) else type(value) is kind


def _name(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return _NAMES.get(kind, "a list" if get_origin(kind) is list else "names with values")


def _wrong(place: str, due: str, value: Any) -> ValueError:
    return ValueError(f"{place} must be {due}, got {_brief(value)}")


def _brief(value: Any) -> str:
    if isinstance(value, dict | list):
        return "names with values" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
