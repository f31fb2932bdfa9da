# SPDX-License-Identifier: Apache-2.0
"""`unipool compare`; what it needs is imported when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_GRID, _TRAINING, _SWEEP = "Models", "Training, alike for all", "Sweep"
_SHARED = ("data", "field", "tokenizer", "seq_len", "batch_size", "accumulate", "steps", "lr")
_SHARED += ("init_std", "eval_tokens", "save_every", "device", "precision")


def _option(help: str, panel: str, *names: str, **rules):
    return typer.Option(*names, help=help, rich_help_panel=panel, **rules)


def compare(
    ctx: typer.Context,
    # --- models
    preset: Annotated[
        list[str] | None,
        _option(
            "main, sharing, pool-size, ablation, granularity, delay, evidence or routers: the "
            "models of a table of the papers; repeatable",
            _GRID,
        ),
    ] = None,
    scale: Annotated[
        str, _option("sizes: tiny, small, 182m, 469m, 650m, 830m or 978m", _GRID)
    ] = "tiny",
    router: Annotated[
        str | None, _option("of norm, softmax, recurrent, recurrent-norm [norm]", _GRID)
    ] = None,
    pools: Annotated[str | None, _option("pools G, each from 1 to the layers [1]", _GRID)] = None,
    pool_size: Annotated[
        str | None,
        _option("experts M a pool, or parts of the baseline's, such as 50%,100% [100%]", _GRID),
    ] = None,
    balance: Annotated[str | None, _option("of pool, layer, none [pool]", _GRID)] = None,
    delay: Annotated[
        str | None, _option("0: load of the same micro-batch, 1: of the last [1]", _GRID)
    ] = None,
    granularity: Annotated[
        str | None,
        _option(
            "parts an expert is cut in, as many a token: 1,2,4 for 8E/top-1 to 32E/top-4 [1]", _GRID
        ),
    ] = None,
    seeds: Annotated[
        str, _option("numbers, for weights, held-out text and order", _GRID)
    ] = "0,1,2",
    # --- training
    data: Annotated[
        list[Path] | None,
        _option("text or .jsonl file, or a folder; repeatable [Python's own source]", _TRAINING),
    ] = None,
    field: Annotated[str, _option("field of a .jsonl row", _TRAINING)] = "text",
    tokenizer: Annotated[
        Path | None, _option("Hugging Face tokenizer folder [bytes]", _TRAINING)
    ] = None,
    seq_len: Annotated[int | None, _option("tokens a sequence", _TRAINING)] = None,
    batch_size: Annotated[int | None, _option("sequences a micro-batch", _TRAINING)] = None,
    accumulate: Annotated[int | None, _option("micro-batches a step", _TRAINING)] = None,
    steps: Annotated[int | None, _option("optimizer steps", _TRAINING)] = None,
    lr: Annotated[
        float | None, _option("highest learning rate; the last is a tenth", _TRAINING)
    ] = None,
    init_std: Annotated[
        float | None, _option("standard deviation of the first weights", _TRAINING, min=0)
    ] = None,
    eval_tokens: Annotated[
        int | None, _option("held-out tokens to evaluate on, 0: all", _TRAINING)
    ] = None,
    save_every: Annotated[
        int | None, _option("steps between checkpoints, 0: only the last", _TRAINING)
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], _option("where to train", _TRAINING)
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        _option("bf16: autocast over float32 weights", _TRAINING),
    ] = None,
    # --- sweep
    out: Annotated[Path, _option("folder of the sweep", _SWEEP)] = Path("runs/compare"),
    jobs: Annotated[int, _option("runs at a time; they divide the cores", _SWEEP, min=1)] = 1,
    resume: Annotated[
        bool,
        _option("go on with the sweep in --out: what is missing or failed", _SWEEP, "--resume"),
    ] = False,
) -> None:
    """Train a grid of models with several seeds, and compare them with the layer-private one.

    Options of a grid, and seeds, take several values with commas between.
    """
    from rich.console import Console

    from unipool.compare.run import run_sweep
    from unipool.compare.sweep import Sweep
    from unipool.errors import InputError, TrainingError

    given = {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name).name == "COMMANDLINE"
    }
    if resume:
        if left := sorted(set(given) - {"resume", "out", "jobs"}):
            option = left[0].replace("_", "-")
            raise InputError(f"--resume takes the sweep in --out as it is: leave out --{option}")
        sweep = Sweep.load(out)
    else:
        sweep = _new_sweep(given, scale, seeds)
    console = Console()
    results, stopped = run_sweep(sweep, out, jobs=jobs, resume=resume, console=console)
    if stopped is not None:
        console.print(f"stopped; go on with: unipool compare --resume --out {out}", soft_wrap=True)
        raise typer.Exit(128 + stopped)
    runs = [run for entry in results["variants"] for run in entry["runs"]]
    if failed := sum(run["status"] == "failed" for run in runs):
        raise TrainingError(f"{failed} of {len(runs)} runs failed; try them again with --resume")


def _new_sweep(given: dict, scale: str, seeds: str):
    from unipool.compare.grid import Axes, Baseline, Size, grid
    from unipool.compare.presets import PRESETS, preset_variants, training, with_baselines
    from unipool.compare.sweep import Sweep
    from unipool.errors import InputError

    parsers = {
        "router": str,
        "pools": int,
        "pool_size": Size.parse,
        "balance": str,
        "delay": int,
        "granularity": int,
    }
    axes = {
        name: _values(name, given[name], parse) for name, parse in parsers.items() if name in given
    }
    if ("preset" in given) == bool(axes):
        raise InputError(
            f"give either --preset ({', '.join(PRESETS)}) or axes of a grid "
            "(--router, --pools, --pool-size, --balance, --delay, --granularity)"
        )
    baseline = Baseline.of(scale)
    chosen = (
        preset_variants(given["preset"], baseline)
        if "preset" in given
        else grid(baseline, Axes(**axes))
    )
    options = training(scale) | _shared_options(given)
    return Sweep(
        scale, tuple(with_baselines(chosen, baseline)), _values("seeds", seeds, int), options
    )


def _values(name: str, text: str, parse) -> tuple:
    """The values of a list with commas; InputError for one that `parse` cannot read."""
    from unipool.errors import InputError

    try:
        return tuple(parse(part.strip()) for part in text.split(","))
    except InputError:
        raise
    except ValueError:
        raise InputError(
            f"--{name.replace('_', '-')} must be numbers with commas between, got {text!r}"
        ) from None


def _shared_options(given: dict) -> dict:
    """Fields of TrainConfig that were given."""
    from unipool.training.config import plain, with_last_rate

    options = {name: plain(name, given[name]) for name in _SHARED if name in given}
    return {"data": ()} | with_last_rate(options)
