# SPDX-License-Identifier: Apache-2.0
"""What each command but `train` (training/config.py) can be told.

Light, so that the command line starts at once; the functions that take them are in the rooms of
their subjects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unipool.errors import InputError
from unipool.options import Option, check_options

Device = Literal["auto", "cpu", "cuda"]
_WHERE_TO_RUN = Option("where to run")
_MODELS, _TRAINING, _SWEEP = "Models", "Training, alike for all", "Sweep"


@dataclass(frozen=True)
class _Checked:
    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class CompareConfig(_Checked):
    """A sweep: models from presets or a grid, the training that they share, and its folder.

    None in the training part means: what fits the scale (compare/presets.py).
    """

    preset: Annotated[
        tuple[str, ...],
        Option(
            "main, sharing, pool-size, ablation, granularity, delay, evidence or routers: the "
            "models of a table of the papers; repeatable",
            _MODELS,
        ),
    ] = ()
    scale: Annotated[str, Option("sizes: tiny, small, 182m, 469m, 650m, 830m or 978m", _MODELS)] = (
        "tiny"
    )
    router: Annotated[
        tuple[str, ...] | None,
        Option("of norm, softmax, recurrent, recurrent-norm [norm]", _MODELS, commas=True),
    ] = None
    pools: Annotated[
        tuple[int, ...] | None,
        Option("pools G, each from 1 to the layers [1]", _MODELS, commas=True),
    ] = None
    pool_size: Annotated[
        tuple[str, ...] | None,
        Option(
            "experts M a pool, or parts of the baseline's, such as 50%,100% [100%]",
            _MODELS,
            commas=True,
        ),
    ] = None
    balance: Annotated[
        tuple[str, ...] | None, Option("of pool, layer, none [pool]", _MODELS, commas=True)
    ] = None
    delay: Annotated[
        tuple[int, ...] | None,
        Option("0: load of the same micro-batch, 1: of the last [1]", _MODELS, commas=True),
    ] = None
    granularity: Annotated[
        tuple[int, ...] | None,
        Option(
            "parts an expert is cut in, as many a token: 1,2,4 for 8E/top-1 to 32E/top-4 [1]",
            _MODELS,
            commas=True,
        ),
    ] = None
    seeds: Annotated[
        tuple[int, ...],
        Option("numbers, for weights, held-out text and order", _MODELS, commas=True),
    ] = (0, 1, 2)

    data: Annotated[
        tuple[str, ...],
        Option(
            "text, .jsonl, .json, .csv or .tsv file, or a folder; repeatable [Python's own source]",
            _TRAINING,
            path="read",
        ),
    ] = ()
    field: Annotated[str, Option("field of a row, or column", _TRAINING)] = "text"
    tokenizer: Annotated[
        str | None, Option("Hugging Face tokenizer folder [bytes]", _TRAINING, path="read")
    ] = None
    seq_len: Annotated[int | None, Option("tokens per sequence", _TRAINING, min=2)] = None
    batch_size: Annotated[int | None, Option("sequences per micro-batch", _TRAINING, min=1)] = None
    accumulate: Annotated[int | None, Option("micro-batches per step", _TRAINING, min=1)] = None
    steps: Annotated[int | None, Option("optimizer steps", _TRAINING, min=1)] = None
    lr: Annotated[
        float | None, Option("highest learning rate; the last is a tenth", _TRAINING, above=0)
    ] = None
    init_std: Annotated[
        float | None, Option("standard deviation of the first weights", _TRAINING, min=0)
    ] = None
    eval_tokens: Annotated[
        int | None, Option("held-out tokens to evaluate on, 0: all", _TRAINING, min=0)
    ] = None
    save_every: Annotated[
        int | None, Option("steps between checkpoints, 0: only the last", _TRAINING, min=0)
    ] = None
    device: Annotated[Device, Option("where to train", _TRAINING)] = "auto"
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Option("bf16: autocast over float32 weights", _TRAINING),
    ] = None

    out: Annotated[Path, Option("folder of the sweep", _SWEEP)] = Path("runs/compare")
    jobs: Annotated[int, Option("runs at a time; they divide the cores", _SWEEP, min=1)] = 1


@dataclass(frozen=True)
class DemoConfig(_Checked):
    """Three small models, trained alike and compared."""

    out: Annotated[Path, Option("folder of the results")] = Path("runs/demo")
    steps: Annotated[
        int | None, Option("steps per model [a few minutes each on 2 cores]", min=1)
    ] = None
    seed: Annotated[int, Option("weights and order of the text", min=0)] = 0
    device: Annotated[Device, Option("where to train")] = "auto"


@dataclass(frozen=True)
class GenerateConfig(_Checked):
    """Text from a trained model."""

    model: Annotated[Path, Option("run, checkpoint or Hugging Face folder", argument=True)]
    prompt: Annotated[str, Option("text to go on from")] = ""
    max_new_tokens: Annotated[int, Option("tokens to write", min=1, max=1 << 20)] = 200
    temperature: Annotated[float, Option("0: always the likeliest token", min=0, max=100)] = 0.8
    seed: Annotated[int, Option("of the sampling", min=0)] = 0
    device: Annotated[Device, _WHERE_TO_RUN] = "auto"


@dataclass(frozen=True)
class EvalConfig(_Checked):
    """Zero-shot tasks of lm-evaluation-harness."""

    checkpoint: Annotated[
        Path, Option("run, checkpoint of one, or Hugging Face model folder", argument=True)
    ]
    task: Annotated[
        tuple[str, ...],
        Option(
            "task, by its name in lm-evaluation-harness; repeatable [arc_easy, arc_challenge, "
            "piqa, hellaswag, winogrande, lambada_openai, race]"
        ),
    ] = ()
    data: Annotated[
        Path | None,
        Option(
            "folder of <task>.jsonl or .json files, rows with the fields of the task's data "
            "on the hub: evaluates offline [the hub's data]"
        ),
    ] = None
    limit: Annotated[int | None, Option("documents a task, the first ones [all]", min=1)] = None
    batch_size: Annotated[int, Option("requests at a time", min=1)] = 8
    max_length: Annotated[
        int | None,
        Option(
            "tokens that the model sees at a time [seq_len of the run, else the model's own]", min=2
        ),
    ] = None
    device: Annotated[Device, _WHERE_TO_RUN] = "auto"
    json: Annotated[Path | None, Option("file for the numbers")] = None


_CHECKPOINT = Option("run, checkpoint of one, or Hugging Face MoE model folder", argument=True)
_TEXT = Option("text to look at; repeatable [what the run of the checkpoint held out]")
_TEXT_FIELD = Option("field of a row, or column, with --data")
_TOKENS = Option("tokens of text, 0: all", min=0)
_SEQ_LEN = Option("tokens per sequence [that of the run, else at most 512]", min=2)
_SEQUENCES = Option("sequences at a time", min=1)


@dataclass(frozen=True)
class ProbeConfig(_Checked):
    """Random experts in one layer at a time."""

    checkpoint: Annotated[Path, _CHECKPOINT]
    data: Annotated[tuple[Path, ...] | None, _TEXT] = None
    field: Annotated[str, _TEXT_FIELD] = "text"
    layer: Annotated[
        tuple[int, ...] | None, Option("decoder layer to probe; repeatable [every MoE layer]")
    ] = None
    seeds: Annotated[int, Option("random routings a layer", min=1, max=10_000)] = 3
    weights: Annotated[
        Literal["rule", "kept"],
        Option("of the random experts: by the router's rule, or those it chose itself"),
    ] = "rule"
    tokens: Annotated[int, _TOKENS] = 1 << 15
    seq_len: Annotated[int | None, _SEQ_LEN] = None
    batch_size: Annotated[int, _SEQUENCES] = 8
    device: Annotated[Device, _WHERE_TO_RUN] = "auto"
    json: Annotated[Path | None, Option("file for the numbers")] = None
    plot: Annotated[Path | None, Option("picture to write, .png")] = None


@dataclass(frozen=True)
class AnalyzeConfig(_Checked):
    """What the routers of a model do, as a report."""

    checkpoint: Annotated[Path, _CHECKPOINT]
    data: Annotated[tuple[Path, ...] | None, _TEXT] = None
    field: Annotated[str, _TEXT_FIELD] = "text"
    out: Annotated[Path, Option("folder of the report")] = Path("runs/analysis")
    tokens: Annotated[int, _TOKENS] = 1 << 16
    shuffles: Annotated[
        int, Option("random pairings of tokens, to compare layers with", min=1, max=10_000)
    ] = 3
    seed: Annotated[int, Option("of the pairings", min=0)] = 0
    seq_len: Annotated[int | None, _SEQ_LEN] = None
    batch_size: Annotated[int, _SEQUENCES] = 8
    device: Annotated[Device, _WHERE_TO_RUN] = "auto"


_SOURCE = Option("run, checkpoint or Hugging Face folder of UniPool or Mixtral", argument=True)
_NEW_FOLDER = Option("folder to write, new or empty", argument=True)


@dataclass(frozen=True)
class ConvertConfig(_Checked):
    """Layer-private experts into one pool, or back, or into Mixtral's format."""

    source: Annotated[Path, _SOURCE]
    out: Annotated[Path, _NEW_FOLDER]
    to: Annotated[
        Literal["shared", "private", "mixtral"],
        Option("one pool; a pool for each layer; or that in Mixtral's format"),
    ]
    balance: Annotated[
        Literal["pool", "layer", "none"] | None,
        Option("balance loss, with --to shared [pool, if the source is private]"),
    ] = None
    untie: Annotated[bool, Option("copy experts that several layers see")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance is not None and self.to != "shared":
            raise InputError("--balance must be left out unless --to is shared")
        if self.untie and self.to == "shared":
            raise InputError("--untie must be left out with --to shared")


@dataclass(frozen=True)
class ResizeConfig(_Checked):
    """More experts in the pools of a model, or fewer."""

    source: Annotated[Path, _SOURCE]
    out: Annotated[Path, _NEW_FOLDER]
    experts: Annotated[int, Option("experts per pool, more or fewer than now", min=1, max=1 << 16)]
    add: Annotated[Literal["copy", "init"], Option("new experts: copies, or drawn")] = "copy"
    show: Annotated[
        Literal["split", "hidden", "all"] | None,
        Option(
            "who sees new experts: copies take over some layers of their original, nobody, "
            "or all [split; all with --add init]"
        ),
    ] = None
    ids: Annotated[
        str | None,
        Option(
            "experts to copy or drop, such as 3,5; with more pools 3,5/0,1 "
            "[the most, or the least, loaded]"
        ),
    ] = None
    load: Annotated[
        Path | None, Option("JSON with the load, [L, M] or [M] [the balance loss's last]")
    ] = None
    seed: Annotated[int, Option("of what is drawn", min=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen()

    def chosen(self) -> list | None:
        """ids: [3, 5], with more pools [[3, 5], [0, 1]]."""
        if self.ids is None:
            return None
        try:
            pools = [[int(part) for part in pool.split(",")] for pool in self.ids.split("/")]
        except ValueError:
            raise InputError(
                f"--ids must be numbers such as 3,5 or 3,5/0,1, got {self.ids!r}"
            ) from None
        return pools if len(pools) > 1 else pools[0]
