# SPDX-License-Identifier: Apache-2.0
"""What defines a training run; written as config.json into its folder."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from unipool.errors import InputError

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


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run. None in the model part means: what `scale` and `form` say."""

    form: str = "unipool"
    scale: str = "tiny"
    d_model: int | None = None
    d_ff: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    init_std: float | None = None
    num_pools: int | None = None
    pool_size: int | None = None
    top_k: int | None = None
    router: str | None = None
    router_state_size: int | None = None
    router_scoring: str | None = None
    balance: str | None = None
    balance_coefficient: float | None = None
    balance_delay: int | None = None

    data: tuple[str, ...] = ()
    field: str = "text"
    tokenizer: str | None = None
    val_fraction: float = 0.05

    seq_len: int = 256
    batch_size: int = 16
    accumulate: int = 1
    steps: int = 1000
    seed: int = 0
    lr: float = 5e-4
    min_lr: float = 5e-5
    warmup: float = 0.01
    weight_decay: float = 0.1
    clip: float = 1.0
    device: str = "auto"
    precision: str = "fp32"

    out: str = "runs/train"
    save_every: int = 200
    eval_every: int = 200
    eval_tokens: int = 1 << 17
    log_every: int = 10
    keep: int = 2

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "steps", "log_every", "keep"):
            _check(getattr(self, name) >= 1, f"{_option(name)} must be >= 1", getattr(self, name))
        for name in ("save_every", "eval_every", "eval_tokens"):
            _check(getattr(self, name) >= 0, f"{_option(name)} must be >= 0", getattr(self, name))
        _check(self.seq_len >= 2, "--seq-len must be >= 2", self.seq_len)
        _check(0 <= self.seed < 1 << 32, "--seed must be in [0, 2**32)", self.seed)
        _check(0 < self.val_fraction < 1, "--val-fraction must be in (0, 1)", self.val_fraction)
        _check(0 < self.lr < math.inf, "--lr must be a positive number", self.lr)
        _check(0 <= self.min_lr <= self.lr, f"--min-lr must be in [0, {self.lr:g}]", self.min_lr)
        _check(0 <= self.warmup < 1, "--warmup must be in [0, 1)", self.warmup)
        _check(0 <= self.weight_decay < math.inf, "--weight-decay must be >= 0", self.weight_decay)
        _check(0 < self.clip < math.inf, "--clip must be a positive number", self.clip)
        for name, values in (("device", ("auto", "cpu", "cuda")), ("precision", ("fp32", "bf16"))):
            value = getattr(self, name)
            _check(value in values, f"{_option(name)} must be one of {', '.join(values)}", value)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.seq_len

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """The configuration in a run's config.json; InputError if it cannot be read."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            values["data"] = tuple(values["data"])
            return cls(**values)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not the configuration of a run: {error}") from error

    def resumed_with(self, given: dict) -> "TrainConfig":
        """This configuration with `given` options replaced; InputError for one that must stay."""
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                raise InputError(
                    f"{_option(name)} must stay {getattr(self, name)} when a run is resumed, "
                    f"got {value}"
                )
        return dataclasses.replace(self, **given)

    def model_config(self, vocab_size: int, separator: int):
        """UniPoolConfig, or LlamaConfig for form "dense". InputError in one line if none fits."""
        from unipool.models import preset

        given = {name: getattr(self, name) for name in _MODEL_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        if self.form == "dense":
            for name in _EXPERT_OPTIONS:
                _check(name not in given, f"{_option(name)} has no meaning with --form dense", None)
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


def plain(name: str, value):
    """An option's value as JSON can hold it; what is read gets its full path, to be found again."""
    if name == "data":
        return tuple(str(path.resolve()) for path in value)
    if name == "tokenizer":
        return str(value.resolve())
    return str(value) if isinstance(value, Path) else value


def with_last_rate(given: dict) -> dict:
    """`given` options; where there is a learning rate without its last one, that is a tenth."""
    if "lr" in given and "min_lr" not in given:
        return given | {"min_lr": given["lr"] / 10}
    return given


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(condition: bool, expectation: str, got) -> None:
    if not condition:
        raise InputError(expectation if got is None else f"{expectation}, got {got}")
