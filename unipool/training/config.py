# SPDX-License-Identifier: Apache-2.0
"""What defines a training run; written as config.json into its folder."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unipool.errors import InputError
from unipool.options import FORMAT, Option, check_options, known_options, read_options
from unipool.scales import find_scale

_MODEL_FIELDS = {  # option -> field of the model's configuration
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "init_std": "initializer_range",
    "num_pools": "num_pools",
    "pool_size": "num_experts",
    "top_k": "num_experts_per_tok",
    "router": "router",
    "router_state_size": "router_state_size",
    "router_scoring": "router_scoring",
    "balance": "balance",
    "balance_coefficient": "balance_coefficient",
    "balance_delay": "balance_delay",
}
_EXPERT_OPTIONS = tuple(_MODEL_FIELDS)[6:]
# Options that may change when a run is resumed: none of them alters a step that has been taken.
CHANGEABLE = frozenset(
    {"out", "device", "steps", "save_every", "eval_every", "eval_tokens", "log_every", "keep"}
)


_MODEL, _DATA, _OPTIM, _RUN = "Model", "Data", "Optimisation", "Run"


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run. None in the model part means: what `scale` and `form` say; elsewhere
    such an option gets its value from the scale (unipool/scales.py) at once."""

    form: Annotated[
        Literal["dense", "vanilla", "unipool"],
        Option("dense MLPs, experts private to each layer, or one shared pool", _MODEL),
    ] = "unipool"
    scale: Annotated[str, Option("sizes: tiny, small, 182m, 469m, 650m, 830m or 978m", _MODEL)] = (
        "tiny"
    )
    d_model: Annotated[int | None, Option("model width D [of the scale]", _MODEL, min=1)] = None
    d_ff: Annotated[int | None, Option("width F of one expert [of the scale]", _MODEL, min=1)] = (
        None
    )
    layers: Annotated[int | None, Option("layers L [of the scale]", _MODEL, min=1)] = None
    heads: Annotated[int | None, Option("attention heads [of the scale]", _MODEL, min=1)] = None
    kv_heads: Annotated[
        int | None, Option("key/value heads [4, or what divides --heads]", _MODEL, min=1)
    ] = None
    init_std: Annotated[
        float | None,
        Option("standard deviation of the first weights [of the scale]", _MODEL, min=0),
    ] = None
    num_pools: Annotated[
        int | None,
        Option("pools G, from 1 (shared) to L (layer-private) [1 or L, by --form]", _MODEL, min=1),
    ] = None
    pool_size: Annotated[
        int | None, Option("experts M in a pool [of the scale]", _MODEL, min=1)
    ] = None
    top_k: Annotated[int | None, Option("experts k a token [1]", _MODEL, min=1)] = None
    router: Annotated[
        Literal["norm", "softmax", "recurrent"] | None,
        Option(
            "how experts are scored; recurrent: a GRU over the layers [norm; softmax for vanilla]",
            _MODEL,
        ),
    ] = None
    router_state_size: Annotated[
        int | None,
        Option("width of the recurrent router's state [width D, at most 256]", _MODEL, min=1),
    ] = None
    router_scoring: Annotated[
        Literal["softmax", "norm"] | None,
        Option("scores of the recurrent router [softmax]", _MODEL),
    ] = None
    balance: Annotated[
        Literal["pool", "layer", "none"] | None,
        Option("what is kept in balance [pool; layer for vanilla]", _MODEL),
    ] = None
    balance_coefficient: Annotated[
        float | None,
        Option("weight of the balance loss [of the scale; 0.01 for vanilla]", _MODEL, min=0),
    ] = None
    balance_delay: Annotated[
        int | None,
        Option(
            "load of the same (0) or the last (1) micro-batch [1; 0 for vanilla]",
            _MODEL,
            min=0,
            max=1,
        ),
    ] = None

    data: Annotated[
        tuple[str, ...],
        Option(
            "text, .jsonl, .json, .csv or .tsv file, or a folder of them; repeatable "
            "[the standard library's source]",
            _DATA,
            path="read",
        ),
    ] = ()
    field: Annotated[str, Option("field of a row, or column", _DATA)] = "text"
    tokenizer: Annotated[
        str | None, Option("Hugging Face tokenizer folder [bytes]", _DATA, path="read")
    ] = None
    val_fraction: Annotated[
        float, Option("part of the text to hold out", _DATA, above=0, below=1)
    ] = 0.05
    seq_len: Annotated[int | None, Option("tokens per sequence [of the scale]", _DATA, min=2)] = (
        None
    )

    batch_size: Annotated[
        int | None, Option("sequences per micro-batch [of the scale]", _OPTIM, min=1)
    ] = None
    accumulate: Annotated[
        int | None, Option("micro-batches per step [of the scale]", _OPTIM, min=1)
    ] = None
    steps: Annotated[int | None, Option("optimizer steps [of the scale]", _OPTIM, min=1)] = None
    seed: Annotated[
        int, Option("weights, held-out split and order of the text", _OPTIM, min=0, below=1 << 32)
    ] = 0
    lr: Annotated[float | None, Option("highest learning rate [of the scale]", _OPTIM, above=0)] = (
        None
    )
    min_lr: Annotated[
        float | None, Option("last learning rate of the cosine [a tenth of --lr]", _OPTIM, min=0)
    ] = None
    warmup: Annotated[
        float | None,
        Option("part of the steps to warm up over [of the scale]", _OPTIM, min=0, below=1),
    ] = None
    weight_decay: Annotated[
        float, Option("AdamW weight decay, of matrices only", _OPTIM, min=0)
    ] = 0.1
    clip: Annotated[float, Option("greatest gradient norm", _OPTIM, above=0)] = 1.0
    device: Annotated[Literal["auto", "cpu", "cuda"], Option("where to train", _OPTIM)] = "auto"
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Option("bf16: autocast over float32 weights [of the scale]", _OPTIM),
    ] = None

    out: Annotated[str, Option("folder of the run", _RUN, path="write")] = "runs/train"
    save_every: Annotated[
        int | None,
        Option("steps between checkpoints, 0: only the last [of the scale]", _RUN, min=0),
    ] = None
    eval_every: Annotated[
        int | None,
        Option("steps between evaluations, 0: only the last [of the scale]", _RUN, min=0),
    ] = None
    eval_tokens: Annotated[
        int | None, Option("held-out tokens to evaluate on, 0: all [of the scale]", _RUN, min=0)
    ] = None
    log_every: Annotated[int, Option("steps between rows of metrics.jsonl", _RUN, min=1)] = 10
    keep: Annotated[int, Option("checkpoints to keep", _RUN, min=1)] = 2

    def __post_init__(self):
        check_options(self)
        recipe = dataclasses.asdict(find_scale(self.scale).recipe)
        recipe["min_lr"] = (self.lr or recipe["lr"]) / 10
        for name, value in recipe.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen for all others
        if self.min_lr > self.lr:
            raise InputError(f"--min-lr must be in [0, {self.lr:g}], got {self.min_lr}")
        if self.steps * self.tokens_per_step >= 1 << 62:
            raise InputError(
                "--steps, --batch-size, --accumulate and --seq-len must be below 2**62 tokens in "
                f"all, got {self.steps * self.tokens_per_step:.3g}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.seq_len

    @property
    def least_batch_bytes(self) -> int:
        """Of the ids and targets of a step, which are read at once; int64."""
        return 16 * self.tokens_per_step

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """The configuration in a run's config.json; InputError if it cannot be read."""
        values = read_options(path, cls)
        optional = {*_MODEL_FIELDS, "tokenizer"}
        needed = [f.name for f in dataclasses.fields(cls) if f.name not in optional]
        if missing := [name for name in needed if name not in values]:
            raise InputError(f"{path} is not the configuration of a run: it lacks {missing[0]}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{path} is not the configuration of a run: {error}") from error

    def resumed_with(self, given: dict) -> "TrainConfig":
        """This configuration with `given` options replaced; InputError for one that must stay."""
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                flag = known_options(type(self))[name].flag
                raise InputError(
                    f"{flag} must stay {getattr(self, name)} when a run is resumed, got {value}"
                )
        return dataclasses.replace(self, **given)

    def model_config(self, vocab_size: int, separator: int):
        """UniPoolConfig, or LlamaConfig for form "dense". InputError in one line if none fits."""
        from unipool.models import preset

        given = {name: getattr(self, name) for name in _MODEL_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        if self.form == "dense":
            for name in _EXPERT_OPTIONS:
                if name in given:
                    flag = known_options(type(self))[name].flag
                    raise InputError(f"{flag} has no meaning with --form dense")
        if "heads" in given and "kv_heads" not in given:
            given["kv_heads"] = next(n for n in (4, 3, 2, 1) if given["heads"] % n == 0)
        try:
            return preset(
                self.scale,
                self.form,
                vocab_size=vocab_size,
                eos_token_id=separator,
                max_position_embeddings=max(1024, self.seq_len),
                **{_MODEL_FIELDS[name]: value for name, value in given.items()},
            )
        except (ValueError, TypeError) as error:
            raise InputError(str(error).strip().splitlines()[0]) from error


def find_run(folder: Path) -> tuple[Path, TrainConfig] | None:
    """The run that `folder` (model, or checkpoints/step-N) lies in, and its options, if any."""
    for run in (folder.parent, folder.parent.parent):
        if (run / "data.key").exists() and (run / "config.json").exists():
            return run, TrainConfig.load(run / "config.json")
    return None
