# SPDX-License-Identifier: Apache-2.0
"""Configuration of the UniPool language model: a Llama backbone whose MLPs are experts of pools."""

import math
from typing import ClassVar

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..nn.pool_pass import WEIGHT_GRADS
from ..nn.recurrent import SCORINGS

FORMAT_VERSION = 1
ROUTERS = ("norm", "softmax", "recurrent")
BALANCES = ("pool", "layer", "none")
MAX_TOP_K = 16  # what the routing kernels support
# Beyond these no model could be built, and trying would take all memory or hours.
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 16  # of one pool
MAX_SIZE = 1 << 24
MAX_PARAMETERS = 1 << 44
MAX_DEFAULT_STATE = 256  # width of the recurrent router's state in the published code

_POSITIVE_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_experts",
    "num_pools",
    "num_experts_per_tok",
)


_MOST = {
    "num_hidden_layers": MAX_LAYERS,
    "num_pools": MAX_LAYERS,
    "num_experts": MAX_EXPERTS,
    "max_position_embeddings": 1 << 31,
}


class UniPoolConfig(PreTrainedConfig):
    """Everything that defines a UniPool model; defaults are the 182m scale of arXiv:2605.06665.

    A Llama backbone whose MLPs are experts of pools. Layer l uses pool floor(l * G / L): G = 1 is
    UniPool, G = num_hidden_layers is layer-private ("vanilla") MoE. The softmax router with
    G = num_hidden_layers and balance = "layer" is the usual MoE baseline.

    What is not listed means what it means in LlamaConfig; RoPE follows transformers 5
    (`rope_parameters`, or `rope_theta=` as a shorthand), with base 1e6 by default.

    Attributes:
        num_pools: G in [1, num_hidden_layers].
        num_experts: M, the SwiGLU experts of one pool.
        intermediate_size: F, the width of *one* expert.
        num_experts_per_tok: k, the experts of a token in each layer, in [1, min(M, 16)].
        layer_experts: None (every layer sees its whole pool), or for each layer the list of the ids
            of the experts that it sees, at least k, in the order of its router's rows. For that
            layer the others do not exist; its router is one of a pool of those experts.
        router: "norm" (NormRouter), "softmax" or "recurrent" (RecurrentRouter; arXiv:2408.06793).
        router_state_size: of the recurrent router, the numbers per token of its state (default:
            hidden_size, at most 256); None for others.
        router_scoring: of the recurrent router, "softmax" (default, as published) or "norm"; None
            for others.
        norm_topk_prob: makes the chosen softmax weights sum to one; with one expert per token the
            router would get no gradient, so that is refused.
        balance: "pool" (one loss per pool over all its layers), "layer" (one loss per layer) or
            "none".
        balance_coefficient: the weight of the balance loss.
        balance_delay: whether the expert fractions come from the previous micro-batch (1, as
            published) or from the same one (0, exact).
        weight_grad: how the layers' gradients of a pool are summed: "deferred" (one product for all
            layers), "accumulate" or "autograd"; see ExpertPool. Equal but for rounding.

    Raises:
        ValueError: one line, for every combination that no model could be built from.
    """

    model_type = "unipool"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "past_key_values",
        "lm_loss",
        "aux_loss",
        "routings",
    ]
    default_theta = 1_000_000.0

    vocab_size: int = 51200
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.01
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0

    num_experts: int = 96
    num_pools: int = 1
    num_experts_per_tok: int = 1
    layer_experts: list[list[int]] | None = None
    router: str = "norm"
    router_state_size: int | None = None
    router_scoring: str | None = None
    norm_topk_prob: bool = False
    balance: str = "pool"
    balance_coefficient: float = 1e-2
    balance_delay: int = 1
    weight_grad: str = "deferred"
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            _check_size("hidden_size", self.hidden_size)
            _check_size("num_attention_heads", self.num_attention_heads)
            _check(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size must be a multiple of num_attention_heads="
                f"{self.num_attention_heads}, got {self.hidden_size}",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.router == "recurrent":
            if self.router_state_size is None:
                _check_size("hidden_size", self.hidden_size)
                self.router_state_size = min(self.hidden_size, MAX_DEFAULT_STATE)
            if self.router_scoring is None:
                self.router_scoring = "softmax"
        _check(
            self.rope_parameters is None or isinstance(self.rope_parameters, dict),
            f"rope_parameters must be a dict, got {self.rope_parameters!r}",
        )
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self):
        """Check the values as they stand now; also runs on saving and when a model is built."""
        for name in _POSITIVE_SIZES:
            _check_size(name, getattr(self, name), _MOST.get(name, MAX_SIZE))
        self._check_total()
        self._check_backbone()
        self._check_experts()
        self._check_router()
        self._check_balance()
        super().validate()

    def pool_index(self, layer: int) -> int:
        """Pool of a layer in [0, num_hidden_layers): floor(layer * G / L)."""
        return layer * self.num_pools // self.num_hidden_layers

    def visible_experts(self, layer: int) -> list[int]:
        """Experts that a layer sees, as ids of its pool, in the order of its router's rows."""
        if self.layer_experts is None:
            return list(range(self.num_experts))
        return list(self.layer_experts[layer])

    def _check_total(self):
        """A lower bound of the parameters, from products of the sizes alone."""
        width, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        experts = self.num_pools * self.num_experts * 3 * width * self.intermediate_size
        attention = self.num_hidden_layers * 2 * width * heads
        total = experts + attention + self.vocab_size * width
        _check(
            total <= MAX_PARAMETERS,
            f"the sizes must give at most 2**44 parameters, got {total:.3g} or more",
        )

    def _check_backbone(self):
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads must be a multiple of num_key_value_heads="
            f"{self.num_key_value_heads}, got {self.num_attention_heads}",
        )
        _check(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, got {self.head_dim}")
        _check(
            self.hidden_act == "silu",
            f'hidden_act must be "silu" (experts are SwiGLU), got {self.hidden_act!r}',
        )
        _check_number("initializer_range", self.initializer_range, 0.0, exclusive=True)
        _check_number("rms_norm_eps", self.rms_norm_eps, 0.0)
        _check_number("attention_dropout", self.attention_dropout, 0.0, 1.0)
        for name in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
            value = getattr(self, name)
            _check(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
        if self.pad_token_id is not None:
            _check(
                isinstance(self.pad_token_id, int) and 0 <= self.pad_token_id < self.vocab_size,
                f"pad_token_id must be in [0, vocab_size={self.vocab_size}), "
                f"got {self.pad_token_id!r}",
            )
        self._check_rope()

    def _check_rope(self):
        # LlamaRotaryEmbedding knows one flat dict and the types of ROPE_INIT_FUNCTIONS.
        parameters = self.rope_parameters
        rope_type = parameters.get("rope_type")
        known = ("default", *ROPE_INIT_FUNCTIONS)
        _check(rope_type in known, f"rope_type must be one of {known}, got {rope_type!r}")
        _check_number("rope_theta", parameters.get("rope_theta"), 0.0, exclusive=True)
        try:
            self.validate_rope()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"UniPoolConfig: rope_parameters: {error.args[0]}") from error

    def _check_experts(self):
        _check(
            self.num_pools <= self.num_hidden_layers,
            f"num_pools must be in [1, num_hidden_layers={self.num_hidden_layers}], "
            f"got {self.num_pools}",
        )
        _check(
            self.num_experts_per_tok <= min(self.num_experts, MAX_TOP_K),
            f"num_experts_per_tok must be in [1, {min(self.num_experts, MAX_TOP_K)}] "
            f"(at most num_experts={self.num_experts} and {MAX_TOP_K}), "
            f"got {self.num_experts_per_tok}",
        )
        _check(
            self.weight_grad in WEIGHT_GRADS,
            f"weight_grad must be one of {WEIGHT_GRADS}, got {self.weight_grad!r}",
        )

        if self.layer_experts is not None:
            self._check_layer_experts()

    def _check_layer_experts(self):
        rows = self.layer_experts
        _check(
            isinstance(rows, list | tuple) and len(rows) == self.num_hidden_layers,
            f"layer_experts must be None or a list of num_hidden_layers={self.num_hidden_layers} "
            f"lists, got {_brief(rows)}",
        )
        for layer, row in enumerate(rows):
            ids = isinstance(row, list | tuple) and all(_is_int(expert) for expert in row)
            _check(
                ids and len(set(row)) == len(row) and all(0 <= e < self.num_experts for e in row),
                f"layer_experts[{layer}] must be a list of distinct ids in "
                f"[0, num_experts={self.num_experts}), got {_brief(row)}",
            )
            _check(
                len(row) >= self.num_experts_per_tok,
                f"layer_experts[{layer}] must have at least num_experts_per_tok="
                f"{self.num_experts_per_tok} experts, got {len(row)}",
            )

    def _check_router(self):
        _check(self.router in ROUTERS, f"router must be one of {ROUTERS}, got {self.router!r}")
        if self.router == "recurrent":
            _check_size("router_state_size", self.router_state_size)
            _check(
                self.router_scoring in SCORINGS,
                f"router_scoring must be one of {SCORINGS}, got {self.router_scoring!r}",
            )
        else:
            for name in ("router_state_size", "router_scoring"):
                value = getattr(self, name)
                _check(
                    value is None,
                    f'{name} must be None unless router is "recurrent", got {value!r}',
                )
        if self.norm_topk_prob:
            _check(
                "softmax" in (self.router, self.router_scoring),
                'norm_topk_prob must be False unless router is "softmax", or "recurrent" with '
                f'router_scoring="softmax", got router={self.router!r}, '
                f"router_scoring={self.router_scoring!r}",
            )
            _check(
                self.num_experts_per_tok > 1,
                "norm_topk_prob must be False with num_experts_per_tok=1: a renormalized single "
                "weight is always 1 and gives the router no gradient",
            )

    def _check_balance(self):
        _check(self.balance in BALANCES, f"balance must be one of {BALANCES}, got {self.balance!r}")
        _check_number("balance_coefficient", self.balance_coefficient, 0.0)
        _check(
            _is_int(self.balance_delay) and self.balance_delay in (0, 1),
            f"balance_delay must be 0 or 1, got {self.balance_delay!r}",
        )
        _check(
            _is_int(self.format_version) and 1 <= self.format_version <= FORMAT_VERSION,
            f"format_version must be in [1, {FORMAT_VERSION}] (a larger one comes from a newer "
            f"UniPool), got {self.format_version!r}",
        )


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _brief(value) -> str:
    if _is_int(value) and value.bit_length() > 256:  # Python shows no integer of 4300 digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"UniPoolConfig: {message}")


def _check_size(name: str, value, most: int = MAX_SIZE) -> None:
    _check(_is_int(value) and value >= 1, f"{name} must be a positive integer, got {_brief(value)}")
    _check(value <= most, f"{name} must be at most {most}, got {_brief(value)}")


def _check_number(name: str, value, low: float, high: float = math.inf, exclusive=False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and low <= value <= high
    _check(
        inside and not (exclusive and value == low),
        f"{name} must be a finite number in {'(' if exclusive else '['}{low:g}, {high:g}], "
        f"got {value!r}",
    )
