# SPDX-License-Identifier: Apache-2.0
"""The five scales of arXiv:2605.06665 and two small ones, each as a dense, a layer-private and a
shared-pool model of equal depth, width and active size; and the counting of parameters."""

from dataclasses import fields

from transformers import LlamaConfig, PreTrainedConfig

from ..scales import SCALES, Scale
from .configuration_unipool import UniPoolConfig

FORMS = ("dense", "vanilla", "unipool")
VANILLA_COEFFICIENT = 1e-2  # balance loss of the published layer-private baseline, at every scale


def preset_names() -> tuple[str, ...]:
    """Names that `preset` knows."""
    return tuple(SCALES)


def preset(name: str, form: str = "unipool", **overrides) -> PreTrainedConfig:
    """Configuration of a scale ("182m", ..., see `preset_names`) in one of three forms.

    "unipool": one pool, NormRouter, pool loss. "vanilla": a pool for each layer (8 experts at the
    paper's scales), softmax router, one balance loss per layer. Both send a token to one expert of
    the dense width. "dense": a LlamaConfig of the same depth, width and attention. `overrides`
    replace fields of the result; a vanilla model of another depth gets as many pools as layers.
    Raises ValueError for an unknown name or form, or a field that the form does not have.
    """
    if name not in SCALES:
        raise ValueError(f"preset: name must be one of {preset_names()}, got {name!r}")
    if form not in FORMS:
        raise ValueError(f"preset: form must be one of {FORMS}, got {form!r}")
    scale = SCALES[name]
    config_class = LlamaConfig if form == "dense" else UniPoolConfig
    values = {
        "vocab_size": scale.vocab_size,
        "hidden_size": scale.hidden_size,
        "intermediate_size": scale.intermediate_size,
        "num_hidden_layers": scale.num_hidden_layers,
        "num_attention_heads": scale.num_attention_heads,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": UniPoolConfig.default_theta},
        "initializer_range": scale.recipe.init_std,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    if form == "dense":
        values |= {"bos_token_id": None, "eos_token_id": None}
    else:
        values |= {"num_experts_per_tok": 1} | _experts(scale, form, overrides)
    known = {field.name for field in fields(config_class)} | {"rope_theta"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"preset: {config_class.__name__} has no field {', '.join(unknown)}")
    if "rope_theta" in overrides:
        del values["rope_parameters"]
    values |= overrides
    if form == "dense":
        _check_backbone(values)
    return config_class(**values)


def _check_backbone(values: dict) -> None:
    # LlamaConfig lets impossible heads through, or says so in an error that is no ValueError.
    shared = {field.name for field in fields(UniPoolConfig)} - {"hidden_act"} | {"rope_theta"}
    try:
        experts = {"num_experts": 1, "num_experts_per_tok": 1}
        given = {name: value for name, value in values.items() if name in shared}
        UniPoolConfig(**given | experts)
    except ValueError as error:
        raise ValueError(str(error).replace("UniPoolConfig", "LlamaConfig", 1)) from None


def _experts(scale: Scale, form: str, overrides: dict) -> dict:
    if form == "unipool":
        return {
            "num_experts": scale.pool_size,
            "num_pools": 1,
            "router": "norm",
            "balance": "pool",
            "balance_coefficient": scale.balance_coefficient,
            "balance_delay": 1,
        }
    return {
        "num_experts": scale.layer_size,
        "num_pools": overrides.get("num_hidden_layers", scale.num_hidden_layers),
        "router": "softmax",
        "balance": "layer",
        "balance_coefficient": VANILLA_COEFFICIENT,
        "balance_delay": 0,
    }


def parameter_counts(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters of the causal language model of a UniPoolConfig or LlamaConfig, not built.

    Returns "total"; "expert", those in pools (0 for a dense model); and "active", those that work
    on one token: all but the experts, and k experts in each layer. Embeddings count in full.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * width * queries + 2 * width * keys
    if config.attention_bias:
        # LlamaAttention gives the output projection, which is as wide as the model, a bias, too.
        attention += queries + 2 * keys + width
    norms = 2 * width
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    shared = embeddings + layers * (attention + norms) + width
    mlp = 3 * width * config.intermediate_size
    if not isinstance(config, UniPoolConfig):
        bias = 2 * config.intermediate_size + width if config.mlp_bias else 0
        total = shared + layers * (mlp + bias)
        return {"total": total, "expert": 0, "active": total}
    state = config.router_state_size
    if config.router == "recurrent":
        projections, row = layers * state * width, state
        shared += 6 * state * (state + 1)  # the GRU: three gates of two matrices and two biases
    else:
        projections, row = 0, width
    views = config.layer_experts
    rows = layers * config.num_experts if views is None else sum(map(len, views))
    scaled = "norm" in (config.router, config.router_scoring)
    shared += projections + rows * row + (layers if scaled else 0)
    expert = config.num_pools * config.num_experts * mlp
    active = shared + layers * config.num_experts_per_tok * mlp
    return {"total": shared + expert, "expert": expert, "active": active}
