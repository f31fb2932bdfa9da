# SPDX-License-Identifier: Apache-2.0
"""Layer-private experts into one pool, one pool into layer-private experts, and Mixtral both ways.

Conversions build a new model with the same function and leave the old one alone. Between our own
models outputs are equal bit for bit on the CPU: each router, with its calibration, keeps exactly
its rows, and only the names of the experts change. The balance loss stays the same, too, up to the
rounding of its coefficient: from one micro-batch of a model with M experts in G pools to one with
M' in G', the factor is M / M' for balance = "layer" and M G^2 / (M' G'^2) for "pool", and the
fractions that a delayed loss keeps move along.
"""

import copy
import re

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from .configuration_unipool import BALANCES, UniPoolConfig
from .modeling_unipool import UniPoolForCausalLM, balanced_layers

# Why models whose experts have our layout still are no UniPool model.
_NO_COUNTERPART = {
    "qwen3_moe": "its attention normalizes queries and keys",
    "olmoe": "its attention normalizes queries and keys",
    "qwen2_moe": "it adds a shared expert to each layer",
    "deepseek_v3": "it has latent attention and shared experts",
    "gpt_oss": "its experts have biases and its attention has sinks",
}
# What MixtralConfig and UniPoolConfig call by the same name.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "num_experts_per_tok",
)
_MIXTRAL_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_MIXTRAL_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")


# --- between our own models


def to_shared(model: UniPoolForCausalLM, balance: str | None = None) -> UniPoolForCausalLM:
    """The G pools of M experts as one pool of G * M, with the same function.

    Each layer goes on seeing only what it saw (config.layer_experts); expert e of pool g becomes
    g * M + e. `set_layer_experts(model)` then lets every layer see the whole pool.

    Args:
        balance: what the result keeps in balance; None for "pool" if the source is layer-private
            (G = L) and balanced, else for that of the source. A source with 1 < G < L, whose "pool"
            and "layer" losses differ, allows no change but to "none".

    Raises:
        ValueError: the model has one pool already, or balance is not possible.
    """
    source = _check_model("to_shared", model)
    if source.num_pools == 1:
        raise ValueError("to_shared: model must have at least 2 pools, got num_pools=1")
    kind = _balance_of_shared(source, balance)
    count = source.num_experts
    ids = [
        [source.pool_index(layer) * count + expert for expert in source.visible_experts(layer)]
        for layer in range(source.num_hidden_layers)
    ]
    state, pools = _split_state(model)
    for name in ("gate_up_proj", "down_proj"):
        state[f"model.pools.0.{name}"] = torch.cat([pool[name] for pool in pools])
    config = _config_like(
        source, num_experts=source.num_pools * count, num_pools=1, layer_experts=ids, balance=kind
    )
    fractions = [
        _place(fraction, range(first, first + count), config.num_experts) * share
        for fraction, first, share in _fractions_by_pool(model, kind)
    ]
    if kind == "pool":
        fractions = [torch.stack(fractions).sum(0)]
    return _build(model, config, state, fractions)


def to_private(
    model: UniPoolForCausalLM, num_pools: int | None = None, untie: bool = False
) -> UniPoolForCausalLM:
    """One pool for each layer (or `num_pools` of them) with the experts that it sees.

    Layers of one new pool must see the same experts, all new pools the same number V of them:
    that is the new num_experts. Experts that no layer sees are left out.

    Args:
        num_pools: G of the result, in (G of the model, L]; None for L.
        untie: copy an expert that several new pools see to each of them. The function is still the
            same, but the copies train apart, and a delayed balance loss starts again from zero.

    Raises:
        ValueError: what the layers see does not allow it.
    """
    source = _check_model("to_private", model)
    layers = source.num_hidden_layers
    num_pools = layers if num_pools is None else num_pools
    if not source.num_pools < num_pools <= layers:
        raise ValueError(
            f"to_private: num_pools must be in [{source.num_pools + 1}, L={layers}] for a model "
            f"with num_pools={source.num_pools}, got {num_pools}"
        )
    seen = [source.visible_experts(layer) for layer in range(layers)]
    target = _config_like(source, num_pools=num_pools, layer_experts=None)
    firsts = _first_layers(target, seen)
    owners = [source.pool_index(layer) for layer in firsts]
    tied = _seen_twice([(pool, seen[layer]) for pool, layer in zip(owners, firsts, strict=True)])
    if tied is not None and not untie:
        raise ValueError(
            f"to_private: each expert must be seen by one new pool only, got expert {tied} in "
            "several; untie=True (--untie) copies such experts"
        )
    config = _config_like(
        source, num_pools=num_pools, num_experts=len(seen[firsts[0]]), layer_experts=None
    )
    state, pools = _split_state(model)
    for new, (owner, layer) in enumerate(zip(owners, firsts, strict=True)):
        for name, weight in pools[owner].items():
            state[f"model.pools.{new}.{name}"] = weight[seen[layer]]
    fractions = None if tied is not None else _private_fractions(model, config, seen)
    return _build(model, config, state, fractions)


# --- Mixtral


def from_mixtral(model: MixtralForCausalLM) -> UniPoolForCausalLM:
    """A Mixtral as a layer-private model: softmax router with renormalized weights, G = L.

    Outputs are equal up to rounding: the layouts are the same, but ours are other kernels, and
    router logits are computed in float32, where Mixtral rounds them to the dtype of the model.
    balance is "layer" with router_aux_loss_coef, on the loss of this project, whose fractions are
    of k * T where those of transformers are of T, and which sums layers instead of pooling them.

    Raises:
        ValueError: the model computes something that ours does not.
    """
    check_mixtral(model.config)
    config = _from_mixtral_config(model.config)
    state = {}
    for name, value in model.state_dict().items():
        if match := _MIXTRAL_ROUTER.fullmatch(name):
            name = f"{match[1]}.router.weight"
        elif match := _MIXTRAL_EXPERTS.fullmatch(name):
            name = f"model.pools.{match[1]}.{match[2]}"
        state[name] = value
    return _build(model, config, state, None)


def to_mixtral(model: UniPoolForCausalLM) -> MixtralForCausalLM:
    """The inverse of `from_mixtral`, for layer-private models with its kind of router.

    Raises:
        ValueError: Mixtral does not compute what the model computes.
    """
    source = _check_model("to_mixtral", model)
    for name, due in (
        ("num_pools", source.num_hidden_layers),
        ("layer_experts", None),
        ("router", "softmax"),
        ("norm_topk_prob", True),
        ("attention_bias", False),
    ):
        value = getattr(source, name)
        if value != due:
            value = "lists" if name == "layer_experts" else repr(value)
            raise ValueError(f"to_mixtral: {name} must be {due!r}, got {value}")
    config = MixtralConfig(
        **{name: copy.deepcopy(getattr(source, name)) for name in _SAME},
        num_local_experts=source.num_experts,
        router_aux_loss_coef=source.balance_coefficient if source.balance != "none" else 0.0,
    )
    state, pools = _split_state(model)
    for layer, pool in enumerate(pools):
        block = f"model.layers.{layer}"
        state[f"{block}.mlp.gate.weight"] = state.pop(f"{block}.router.weight")
        for name, weight in pool.items():
            state[f"{block}.mlp.experts.{name}"] = weight
    return _build(model, config, state, None)


def check_mixtral(config) -> None:
    """Raise ValueError, one line, if a configuration is not one that `from_mixtral` can take."""
    if config.model_type != "mixtral":
        reason = _NO_COUNTERPART.get(config.model_type, "its layers are not known to be the same")
        raise ValueError(
            f"convert: model_type must be 'unipool' or 'mixtral', got {config.model_type!r}: "
            f"{reason}"
        )
    for name, due in (("sliding_window", None), ("router_jitter_noise", 0.0)):
        value = getattr(config, name)
        if value != due:
            raise ValueError(f"convert: {name} of a Mixtral must be {due}, got {value!r}")
    _from_mixtral_config(config)


def _from_mixtral_config(config: MixtralConfig) -> UniPoolConfig:
    return UniPoolConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _SAME},
        num_experts=config.num_local_experts,
        num_pools=config.num_hidden_layers,
        router="softmax",
        norm_topk_prob=True,
        balance="layer",
        balance_coefficient=config.router_aux_loss_coef,
        balance_delay=0,
    )


# --- parts


def _check_model(op: str, model) -> UniPoolConfig:
    if not isinstance(model, UniPoolForCausalLM):
        raise TypeError(f"{op}: model must be a UniPoolForCausalLM, got {type(model).__name__}")
    return model.config


def _balance_of_shared(source: UniPoolConfig, balance: str | None) -> str:
    private = source.num_pools == source.num_hidden_layers
    if balance is None:
        return "pool" if private and source.balance != "none" else source.balance
    if balance not in BALANCES:
        raise ValueError(f"to_shared: balance must be one of {BALANCES}, got {balance!r}")
    if balance not in (source.balance, "none") and not (private and source.balance != "none"):
        raise ValueError(
            f"to_shared: balance must be {source.balance!r} or 'none' for a model with "
            f"num_pools={source.num_pools} and balance={source.balance!r}, got {balance!r}"
        )
    return balance


def _config_like(source: UniPoolConfig, **changes) -> UniPoolConfig:
    """The configuration with `changes`, and the coefficient that keeps the balance loss."""
    values = source.to_dict() | changes
    values.pop("transformers_version", None)
    factor = source.num_experts / values["num_experts"]
    if values["balance"] == "pool":
        factor *= (source.num_pools / values["num_pools"]) ** 2
    return UniPoolConfig(**values | {"balance_coefficient": source.balance_coefficient * factor})


def _first_layers(config: UniPoolConfig, seen: list[list[int]]) -> list[int]:
    """The first layer of each pool of `config`, whose layers must see the same, in equal number."""
    firsts: list[int] = []
    for layer, experts in enumerate(seen):
        pool = config.pool_index(layer)
        if pool == len(firsts):
            firsts.append(layer)
        if experts != seen[firsts[pool]]:
            raise ValueError(
                "to_private: layers of one new pool must see the same experts in the same order, "
                f"got layers {firsts[pool]} and {layer} that do not"
            )
        if len(experts) != len(seen[0]):
            raise ValueError(
                "to_private: all layers must see the same number of experts, got "
                f"{len(seen[0])} in layer 0 and {len(experts)} in layer {layer}"
            )
    return firsts


def _seen_twice(views: list[tuple[int, list[int]]]) -> int | None:
    """An expert that is in several of the views (pool, ids), or None."""
    known: set[tuple[int, int]] = set()
    for pool, ids in views:
        for expert in ids:
            if (pool, expert) in known:
                return expert
            known.add((pool, expert))
    return None


def _split_state(model: UniPoolForCausalLM) -> tuple[dict, list[dict]]:
    """The state dict without pools and balance state, and the weights of each pool."""
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(("model.pools.", "model.balancers."))
    }
    pools = [
        {"gate_up_proj": pool.gate_up_proj.detach(), "down_proj": pool.down_proj.detach()}
        for pool in model.model.pools
    ]
    return state, pools


def _place(values: Tensor, ids, length: int) -> Tensor:
    placed = values.new_zeros(length)
    placed[list(ids)] = values
    return placed


def _fractions_by_pool(model: UniPoolForCausalLM, kind: str) -> list[tuple[Tensor, int, float]]:
    """For each balance loss of the source: (fraction [M], first id of its pool, its share).

    The share is that of the loss's layers among all, by which fractions of one pool are a mean;
    with kind = "layer" each stays a loss of its own.
    """
    config = model.config
    groups = balanced_layers(config) if kind != "none" else []
    return [
        (
            balancer.fraction,
            config.pool_index(layers[0]) * config.num_experts,
            1.0 if kind == "layer" else len(layers) / config.num_hidden_layers,
        )
        for balancer, layers in zip(model.model.balancers, groups, strict=False)
    ]


def _private_fractions(
    model: UniPoolForCausalLM, config: UniPoolConfig, seen: list[list[int]]
) -> list[Tensor]:
    """Fractions for the balance losses of `config`, from those that covered their layers."""
    groups = balanced_layers(model.config)
    fractions = []
    for layers in balanced_layers(config):
        index = next(i for i, group in enumerate(groups) if layers[0] in group)
        share = len(groups[index]) / len(layers)
        fractions.append(model.model.balancers[index].fraction[seen[layers[0]]] * share)
    return fractions


def _build(
    source: PreTrainedModel, config, state: dict, fractions: list[Tensor] | None
) -> PreTrainedModel:
    """A model of `config` with copies of `state`, in the dtypes, device and mode of `source`."""
    model_class = UniPoolForCausalLM if isinstance(config, UniPoolConfig) else MixtralForCausalLM
    config.dtype = source.config.dtype
    config._attn_implementation = source.config._attn_implementation
    model = model_class(config)
    if model_class is UniPoolForCausalLM:
        # The router's scale and the balance state are float32 in models of any dtype.
        for index, balancer in enumerate(model.model.balancers):
            device = source.device
            fraction = balancer.fraction if fractions is None else fractions[index]
            state[f"model.balancers.{index}.fraction"] = fraction.to(device)
    state = {name: value.detach().clone() for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for name, buffer in source.model.rotary_emb.named_buffers():  # not saved, but may be rounded
        setattr(model.model.rotary_emb, name, buffer.clone())
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device).train(source.training)
