# SPDX-License-Identifier: Apache-2.0
"""A sweep in one folder.

<out>/sweep.json                    the models, seeds and options, as resolved
<out>/runs/<model>/seed-<n>/        one run each, as `unipool train` writes it
<out>/results.json table.md *.png report.html    what came of it; see summary.py and report.py
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from unipool import schema
from unipool.compare.grid import Axes, Baseline, Size, Variant, grid, vanilla
from unipool.compare.members import Member
from unipool.compare.presets import PRESETS, preset_variants, training, with_baselines
from unipool.configs import CompareConfig
from unipool.errors import InputError
from unipool.options import FORMAT
from unipool.training.config import TrainConfig

SWEEP_FILE = "sweep.json"
_SHARED = ("data", "field", "tokenizer", "seq_len", "batch_size", "accumulate", "steps", "lr")
_SHARED += ("init_std", "eval_tokens", "save_every", "device", "precision")


_ADVICE = "put back the file that was there, or start a new sweep"
_Count = Annotated[int, schema.Range(min=1)]
_Whole = Annotated[int, schema.Range(min=0)]


class _SavedVariant(TypedDict):
    router: str
    pools: _Count
    pool_size: _Count
    balance: str
    delay: _Whole
    granularity: _Count


class _Options(TypedDict):
    """Of TrainConfig, which checks their ranges."""

    data: list[str]
    seq_len: _Count
    batch_size: _Count
    steps: _Count
    lr: float
    min_lr: float


class _AllOptions(_Options, total=False):
    accumulate: _Count
    device: str
    eval_every: _Whole
    eval_tokens: _Whole
    field: str
    init_std: float
    keep: _Count
    log_every: _Count
    precision: str
    save_every: _Whole
    tokenizer: str
    warmup: float


class _SavedBefore(TypedDict, total=False):
    format: Literal[1]


class _Saved(_SavedBefore):
    scale: str
    variants: list[_SavedVariant]
    seeds: list[_Whole]
    options: _AllOptions


@dataclass(frozen=True)
class Sweep:
    """variants: the baselines and the models to compare with them, each trained with every seed.

    options: fields of TrainConfig that all runs share.
    """

    scale: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    options: dict

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds must be distinct numbers, got {list(self.seeds)}")

    @classmethod
    def of(cls, config: CompareConfig) -> "Sweep":
        """What the options say; InputError, in one line, for what cannot be."""
        baseline = Baseline.of(config.scale)
        variants = with_baselines(_chosen(config, baseline), baseline)
        options = training(config.scale, **{"data": ()} | _shared_options(config))
        return cls(config.scale, tuple(variants), config.seeds, options)

    def config(self, variant: Variant, seed: int, out: Path) -> TrainConfig:
        folder = Path(out) / "runs" / variant.name / f"seed-{seed}"
        chosen = variant.options(Baseline.of(self.scale))
        return TrainConfig(**self.options | chosen | {"seed": seed, "out": str(folder)})

    def members(self, out: Path) -> list[Member]:
        """Seed by seed, so that a sweep cut short has whole rows to compare."""
        return [
            Member(variant, self.config(variant, seed, out))
            for seed in self.seeds
            for variant in self.variants
        ]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, out: Path) -> "Sweep":
        """The sweep in folder `out`; InputError if there is none, or not one that `of` makes."""
        path = Path(out) / SWEEP_FILE
        if not path.is_file():
            raise InputError(f"--resume: {out} holds no sweep")
        values = schema.read(path, _Saved, _ADVICE)
        variants = tuple(Variant(**variant) for variant in values["variants"])
        try:
            sweep = cls(values["scale"], variants, tuple(values["seeds"]), values["options"])
            sweep.options["data"] = tuple(sweep.options["data"])
            _check_whole(sweep)
            sweep.members(out)
        except InputError as error:
            raise InputError(f"{path} is not a sweep: {error}; {_ADVICE}") from error
        return sweep


def _check_whole(sweep: Sweep) -> None:
    """InputError unless the variants are of a grid, each once, and their baselines are there."""
    baseline = Baseline.of(sweep.scale)
    if not sweep.variants or len(set(sweep.variants)) < len(sweep.variants):
        raise InputError("variants must be distinct models, at least one")
    for variant in sweep.variants:
        values = dataclasses.asdict(variant)
        axes = {name: (value,) for name, value in values.items() if name != "pool_size"}
        grid(baseline, Axes(**axes, pool_size=(Size(count=variant.pool_size),)))
        if vanilla(baseline, variant.granularity) not in sweep.variants:
            raise InputError(
                f"variants lack the layer-private model to compare {variant.name} with"
            )


def _chosen(config: CompareConfig, baseline: Baseline) -> list[Variant]:
    """The models of the presets, or of the grid."""
    axes = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(Axes)}
    axes = {name: values for name, values in axes.items() if values is not None}
    if bool(config.preset) == bool(axes):
        raise InputError(
            f"give either --preset ({', '.join(PRESETS)}) or axes of a grid "
            "(--router, --pools, --pool-size, --balance, --delay, --granularity)"
        )
    if config.preset:
        return preset_variants(config.preset, baseline)
    if "pool_size" in axes:
        axes["pool_size"] = tuple(map(Size.parse, axes["pool_size"]))
    return grid(baseline, Axes(**axes))


def _shared_options(config: CompareConfig) -> dict:
    """The fields of TrainConfig that were given."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(CompareConfig)}
    given = {name: getattr(config, name) for name in _SHARED}
    return {name: value for name, value in given.items() if value != defaults[name]}
