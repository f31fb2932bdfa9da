# SPDX-License-Identifier: Apache-2.0
"""The models of arXiv:2605.06665 and two small ones: their sizes, and the recipe that trains each.

Whatever trains a scale takes what it is not told from here.
"""

from dataclasses import dataclass

from unipool.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Options of a run (training/config.py) that depend on the scale."""

    init_std: float
    seq_len: int
    batch_size: int
    accumulate: int
    steps: int
    lr: float  # the last one is a tenth of it
    warmup: float
    precision: str
    save_every: int
    eval_every: int
    eval_tokens: int


# 60,000 steps of 512 x 1024 tokens: 31.5 billion.
_PUBLISHED = Recipe(
    init_std=0.01,
    seq_len=1024,
    batch_size=8,
    accumulate=64,
    steps=60_000,
    lr=5e-4,
    warmup=0.01,
    precision="bf16",
    save_every=1000,
    eval_every=1000,
    eval_tokens=1 << 22,
)
# Minutes on a CPU, on text as bytes.
_BYTES = Recipe(
    # With 0.01, as at the published scales, a short run at this width leaves most tokens with a
    # NormRouter score of zero for every expert: the router's weights turn negative together.
    init_std=0.05,
    seq_len=256,
    batch_size=8,
    accumulate=1,
    steps=800,
    lr=2e-3,
    warmup=0.05,
    precision="fp32",
    save_every=250,
    eval_every=250,
    eval_tokens=1 << 17,
)


@dataclass(frozen=True)
class Scale:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    pool_size: int  # experts of the one UniPool pool
    layer_size: int  # experts of a layer in the layer-private model
    balance_coefficient: float  # of the UniPool model
    vocab_size: int = 51200  # GPT-2's 50257 entries, padded to a multiple of 1024
    recipe: Recipe = _PUBLISHED


SCALES = {
    "182m": Scale(768, 3072, 12, 12, 96, 8, 1e-2),
    "469m": Scale(1024, 4096, 24, 16, 192, 8, 2e-2),
    "650m": Scale(1024, 4096, 36, 16, 288, 8, 2e-2),
    "830m": Scale(1024, 4096, 48, 16, 384, 8, 2e-2),
    "978m": Scale(1536, 6144, 24, 16, 192, 8, 2e-2),
    "tiny": Scale(64, 128, 4, 4, 16, 4, 1e-2, vocab_size=256, recipe=_BYTES),
    "small": Scale(128, 256, 6, 4, 48, 8, 1e-2, vocab_size=256, recipe=_BYTES),
}


def find_scale(name: str) -> Scale:
    """InputError for an unknown name."""
    if name not in SCALES:
        raise InputError(f"--scale must be one of {', '.join(SCALES)}, got {name}")
    return SCALES[name]
