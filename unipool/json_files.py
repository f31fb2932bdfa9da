# SPDX-License-Identifier: Apache-2.0
"""JSON from files that may be damaged, or made to do harm: what is wrong is one line."""

import json
from pathlib import Path
from typing import Any

from unipool.errors import InputError

_DEEPEST = 32  # nesting of what we or Hugging Face write is below ten
_LARGEST = 64 << 20  # bytes of one file that holds settings or rows of numbers


def parse_json(text: str, ours: bool = True) -> Any:
    """The value that `text` holds; ValueError, in one line, for whatever is not plain JSON.

    Refused, besides bad syntax: nesting that Python cannot follow and integers of more digits than
    it converts; if `ours`, which no text to train on is, also a name that stands twice in an object
    and nesting beyond 32.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object if ours else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if ours:
        _check_depth(value)
    return value


def read_json(path: Path) -> Any:
    """As parse_json, of a file; InputError, naming it, where it cannot be read or is not JSON."""
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise InputError(f"{path} has more than {_LARGEST >> 20} MiB: that is no file of ours")
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: it is not UTF-8 (byte {error.start})") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {' '.join(str(error).split())}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} stands twice in an object")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for part in inner if not isinstance(part, _PLAIN) for v in part]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_DEEPEST}")


_PLAIN = (str, int, float, type(None))
