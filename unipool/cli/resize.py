# SPDX-License-Identifier: Apache-2.0
"""`unipool convert` and `unipool resize`; what they need is imported when they run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_Source = Annotated[
    Path, typer.Argument(help="run, checkpoint or Hugging Face folder of UniPool or Mixtral")
]
_Out = Annotated[Path, typer.Argument(help="folder to write, new or empty")]


def convert(
    source: _Source,
    out: _Out,
    to: Annotated[
        Literal["shared", "private", "mixtral"],
        typer.Option(help="one pool; a pool for each layer; or that in Mixtral's format"),
    ],
    balance: Annotated[
        Literal["pool", "layer", "none"] | None,
        typer.Option(help="balance loss, with --to shared [pool, if the source is private]"),
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="copy experts that several layers see")
    ] = False,
) -> None:
    """Turn layer-private experts into one pool, or back; the outputs stay the same."""
    from unipool.checkpoints import find_model
    from unipool.errors import InputError

    if balance is not None and to != "shared":
        raise InputError("--balance must be left out unless --to is shared")
    if untie and to == "shared":
        raise InputError("--untie must be left out with --to shared")
    find_model(source)  # before the slow imports, so that a wrong path shows at once
    from unipool.models.folders import convert_folder

    config = convert_folder(source, out, to, balance=balance, untie=untie)
    print(f"model: {out} ({_pools(config)})")


def resize(
    source: _Source,
    out: _Out,
    experts: Annotated[int, typer.Option(help="experts a pool, more or fewer than now", min=1)],
    add: Annotated[
        Literal["copy", "init"], typer.Option(help="new experts: copies, or drawn")
    ] = "copy",
    show: Annotated[
        Literal["split", "hidden", "all"] | None,
        typer.Option(
            help="who sees new experts: copies take over some layers of their original, nobody, "
            "or all [split; all with --add init]"
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            help="experts to copy or drop, such as 3,5; with more pools 3,5/0,1 "
            "[the most, or the least, loaded]"
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(help="JSON with the load, [L, M] or [M] [the balance loss's last]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of what is drawn", min=0)] = 0,
) -> None:
    """Add experts to the pools, or drop some; a checkpoint's optimizer goes along."""
    from unipool.checkpoints import find_model

    chosen = None if ids is None else _ids(ids)
    find_model(source)
    from unipool.models.folders import resize_folder

    origins = resize_folder(
        source, out, experts, add=add, show=show, experts=chosen, load=load, seed=seed
    )
    for pool, origin in enumerate(origins):
        print(f"pool {pool}: experts {_runs(origin)} of before")
    print(f"model: {out}")


def _pools(config) -> str:
    if config.model_type == "mixtral":
        return f"Mixtral of {config.num_hidden_layers} x {config.num_local_experts} experts"
    return f"{config.num_pools} x {config.num_experts} experts"


def _ids(text: str) -> list:
    from unipool.errors import InputError

    try:
        pools = [[int(part) for part in pool.split(",")] for pool in text.split("/")]
    except ValueError:
        raise InputError(f"--ids must be numbers such as 3,5 or 3,5/0,1, got {text!r}") from None
    return pools if len(pools) > 1 else pools[0]


def _runs(origin: list[int]) -> str:
    """[0, 1, 2, 5, -1] -> "0-2 5 new"."""
    runs: list[list[int]] = []
    for expert in origin:
        if expert >= 0 and runs and runs[-1][-1] == expert - 1:
            runs[-1][1:] = [expert]
        else:
            runs.append([expert])
    return " ".join(
        "new" if run[0] < 0 else "-".join(str(expert) for expert in run) for run in runs
    )
