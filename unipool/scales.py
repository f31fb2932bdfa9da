# SPDX-License-Identifier: Apache-2.0
"""The sizes of the models of arXiv:2605.06665, and of two small ones."""

from dataclasses import dataclass


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


SCALES = {
    "182m": Scale(768, 3072, 12, 12, 96, 8, 1e-2),
    "469m": Scale(1024, 4096, 24, 16, 192, 8, 2e-2),
    "650m": Scale(1024, 4096, 36, 16, 288, 8, 2e-2),
    "830m": Scale(1024, 4096, 48, 16, 384, 8, 2e-2),
    "978m": Scale(1536, 6144, 24, 16, 192, 8, 2e-2),
    # These read bytes.
    "tiny": Scale(64, 128, 4, 4, 16, 4, 1e-2, vocab_size=256),
    "small": Scale(128, 256, 6, 4, 48, 8, 1e-2, vocab_size=256),
}
