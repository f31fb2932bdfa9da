# SPDX-License-Identifier: Apache-2.0
"""Options stand once, as the fields of a dataclass:

    @dataclass(frozen=True)
    class TrainConfig:
        steps: Annotated[int, Option("optimizer steps", "Optimisation", min=1)] = 1000

From such a field come the option of the command line (cli/options.py), the key of a configuration
file, and the check of what a caller gives, all in the same words. Types are those that a file can
hold: str, int, float, bool, Path, Literal, and tuples of one of them; a field may be None where its
type says so.
"""

import difflib
import math
import os
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from unipool.errors import InputError
from unipool.json_files import parse_json

FORMAT = 1  # of the files that we write options to, and read back
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_KINDS |= {Path: "a path"}


@dataclass(frozen=True)
class Option:
    """What a field's name, type and default leave open.

    help ends with what the default means, in brackets, where its value does not say it. min and max
    belong to the range, above and below do not; a range with an upper end has a lower one, too.
    argument: given by its place instead of its name. path: a text that is a path; the command line
    makes one to "read" a full one, to be found again. commas: several values in one text on the
    command line.
    """

    help: str
    panel: str | None = None
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    argument: bool = False
    path: Literal["read", "write"] | None = None
    commas: bool = False

    def holds(self, number: float) -> bool:
        """Whether the number is finite and in the range."""
        return (
            (isinstance(number, int) or math.isfinite(number))
            and (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    @property
    def range(self) -> str:
        """Of numbers, as "must be ..." goes on."""
        low = self.min if self.above is None else self.above
        high = self.max if self.below is None else self.below
        if high is not None:
            opening, closing = "(" if self.min is None else "[", ")" if self.max is None else "]"
            return f"in {opening}{_shown(low)}, {_shown(high)}{closing}"
        if low is None:
            return "a finite number"
        return "a positive number" if self.above == 0 else f">= {_shown(low)}"

    @property
    def bounds(self) -> str:
        """The range as x>=1 or 0<x<1; nothing if there is none."""
        low, over = (self.min, "<=") if self.above is None else (self.above, "<")
        high, under = (self.max, "<=") if self.below is None else (self.below, "<")
        if high is not None:
            return f"{_shown(low)}{over}x{under}{_shown(high)}"
        return "" if low is None else f"x{over.replace('<', '>')}{_shown(low)}"


def _brief(value: Any) -> str:
    """str(value), cut; Python shows no integer of more than 4300 digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _can_be_path(value: str | Path) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _cut(value: Any) -> str:
    text = _brief(value) if isinstance(value, int) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _shown(bound: float) -> str:
    large = isinstance(bound, int) and bound > 1 << 16 and bound.bit_count() == 1
    return f"2**{bound.bit_length() - 1}" if large else f"{bound:g}"


@dataclass(frozen=True)
class Field:
    """One option of a configuration. kind: the type of a value, or of one of `many`."""

    name: str
    kind: type
    choices: tuple[str, ...]
    many: bool
    default: Any  # MISSING where it has to be given
    option: Option

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def flag(self) -> str:
        """What it is called in messages."""
        return self.name if self.option.argument else "--" + self.name.replace("_", "-")

    @property
    def _is_path(self) -> bool:
        return self.kind is Path or self.option.path is not None

    def check(self, value: Any) -> None:
        """InputError unless `value` has the field's type and is in its range."""
        if value is None and self.default is None:
            return
        for one in value if self.many and isinstance(value, list | tuple) else (value,):
            if self.choices:
                fits, due = one in self.choices, f"one of {', '.join(self.choices)}"
            elif self.kind in (int, float):
                number = isinstance(one, int | self.kind) and not isinstance(one, bool)
                fits = number and self.option.holds(one)
                due = self.option.range if number else _KINDS[self.kind]
                if fits and isinstance(one, int) and abs(one) >= 1 << 62:
                    raise InputError(f"{self.flag} must be below 2**62, got {_brief(one)}")
            else:
                fits, due = isinstance(one, self.kind), _KINDS[self.kind]
                if fits and self._is_path and not _can_be_path(one):
                    fits, due = False, "a path"
            if not fits:
                raise InputError(f"{self.flag} must be {due}, got {_brief(one)}")

    def convert(self, value: Any) -> Any:
        """A value of a file or of the command line, as the field's type; InputError if it is none.

        Ranges are left to `check`.
        """
        if value is None:
            return () if self.default == () else None
        if not self.many:
            return self._convert_one(value)
        if isinstance(value, str) and self.option.commas:
            try:
                return tuple(self._convert_one(part.strip()) for part in value.split(","))
            except InputError:
                text = f"{self.flag} must be numbers with commas between, got {value!r}"
                raise InputError(text) from None
        values = value if isinstance(value, list | tuple) else (value,)
        return tuple(map(self._convert_one, values))

    def _convert_one(self, value: Any) -> Any:
        if self._is_path and isinstance(value, str | Path) and not _can_be_path(value):
            raise InputError(f"{self.flag} must be a path, got {_cut(value)}")
        if self.option.path and isinstance(value, str | Path):
            return str(value)
        kind, given = self.kind, type(value)
        # A file may hold 1 for 1.0, and YAML takes 5e-4 for a text; a number may stand for a text.
        texts = {int: (str,), float: (str, int), str: (int, float), Path: (str,)}
        if given is kind or (isinstance(value, kind) and given is not bool):
            return value
        if given in texts.get(kind, ()):
            try:
                return kind(value)
            except ValueError:
                pass
        raise InputError(f"{self.flag} must be {_KINDS[kind]}, got {_cut(value)}")


@cache
def known_options(config: type) -> dict[str, Field]:
    """The options of the dataclass `config` by name, in its order."""
    hints = get_type_hints(config, include_extras=True)
    return {entry.name: _field(entry, hints[entry.name]) for entry in fields(config)}


def _field(entry, hint) -> Field:
    kind, option = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    if not isinstance(option, Option):
        raise TypeError(f"{entry.name} must be Annotated with an Option, got {hint}")
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    many = get_origin(kind) is tuple
    if many:
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Field(entry.name, str if choices else kind, choices, many, entry.default, option)


def check_options(config: Any) -> None:
    """InputError for the first option of a configuration that is not of its type or range."""
    for name, field in known_options(type(config)).items():
        field.check(getattr(config, name))


def read_options(file: Path, config: type) -> dict[str, Any]:
    """The options of the dataclass `config` in a JSON, YAML or TOML file (by its suffix).

    Raises InputError for a file that cannot be read, an unknown key or a value of another type.
    """
    values = _parse(Path(file))
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold options by name, got {type(values).__name__}")
    if values.get("format", FORMAT) != FORMAT or isinstance(values.get("format"), bool):
        raise InputError(
            f"{file} has format {_brief(values['format'])}, which is not the {FORMAT} that this "
            "version of UniPool reads"
        )
    found, known = {}, known_options(config)
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name == "format":
            continue
        if name not in known:
            raise InputError(
                f"{file} has an unknown option {str(key)[:80]!r}{nearest(name, known)}"
            )
        try:
            found[name] = known[name].convert(value)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the known name nearest to `name`; nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _parse(file: Path) -> Any:
    readers = {".json": _json, ".yaml": _yaml, ".yml": _yaml, ".toml": _toml}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"{file} must end in {', '.join(readers)}, to tell how it is written")
    try:
        return reader(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except ImportError as error:
        raise InputError(f"{file}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{file} is nested too deep to hold options") from error
    except ValueError as error:
        kind = file.suffix[1:].upper()
        raise InputError(f"{file} is not {kind}: {' '.join(str(error).split())}") from error


def _json(text: str) -> Any:
    return parse_json(text)


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError("YAML needs PyYAML: pip install pyyaml") from None
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError("TOML needs Python 3.11, or tomli: pip install tomli") from None
    return tomllib.loads(text)
