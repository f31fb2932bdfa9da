# SPDX-License-Identifier: Apache-2.0
"""Ways in which a file may be damaged, or made to do harm: any file, and JSON by its names."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from unipool.files import MANIFEST, complete_folder

OF_ANY: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "not utf-8": lambda content: b"\xff\xfe\xfa" + content,
    "blank": lambda content: b" \n",
    "noise": lambda content: random.Random(0).randbytes(300),
    "twice": lambda content: content + content,
    "null": lambda content: b"null\n",
    "number": lambda content: b"1\n",
    "text": lambda content: b'"text"\n',
    "list": lambda content: b"[]\n",
    "nothing in it": lambda content: b"{}\n",
    "list of it": lambda content: b"[" + content + b"]",
    "deep": lambda content: b"[" * 100_000,
    "deep names": lambda content: b'{"format":' * 5_000 + b"1" + b"}" * 5_000,
    "digits": lambda content: b'{"format": ' + b"9" * 5_000 + b"}",
    "escapes": lambda content: b'{"\\ud800\\u001b[2J": 1}\n',
    "markup": lambda content: b"<html>[/red]</html>\n",
}

VALUES = [None, True, -1, 0, 1.5, 10**30, "", "text", [], {}, [[]], float("nan"), "\x1b[2J"]


def of_json(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Each name of the outermost object left out, and with each of VALUES; one name too many."""
    try:
        whole = json.loads(content)
    except ValueError:
        return
    if not isinstance(whole, dict):
        return
    for name in whole:
        rest = {key: value for key, value in whole.items() if key != name}
        yield f"without {name}", json.dumps(rest).encode()
        for value in VALUES:
            yield f"{name}={value!r}", json.dumps(whole | {name: value}).encode()
    yield "another name", json.dumps(whole | {"another name": 1}).encode()


def reseal(folder: Path) -> None:
    """A manifest that vouches for what is there now, as whoever forges a folder would write."""
    kept = folder.with_name(folder.name + ".kept")
    folder.rename(kept)
    with complete_folder(folder) as staging:
        shutil.copytree(kept, staging, dirs_exist_ok=True)
        (staging / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(kept)
