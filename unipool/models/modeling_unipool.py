# SPDX-License-Identifier: Apache-2.0
"""Llama backbone whose MLPs are experts drawn from pools that the root of the model owns.

Attention, RMSNorm, RoPE, cache and generation are the library's. A layer holds its router, is given
its pool, and returns what it routed; the pools (one copy each, wherever the model is saved or
sharded) and the balance loss with its state belong to the root.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..nn import (
    ExpertPool,
    NormRouter,
    PoolBalancer,
    PoolPass,
    RecurrentRouter,
    SoftmaxRouter,
    pooled_moe,
)
from ..ops import Routing
from .arguments import CACHE, check_arguments, takes_cache
from .configuration_unipool import UniPoolConfig
from .subset import ExpertSubset
from .trainer_loss import targets_of_step, warn_of_loss_outside


class _RoutedOutput:
    @property
    def load(self) -> Tensor:
        """[L, M] int32: (token, slot) pairs that each layer sent to each expert of its pool."""
        return torch.stack([routing.load for routing in self.routings])


@dataclass
class UniPoolModelOutput(_RoutedOutput, BaseModelOutputWithPast):
    """Output of UniPoolModel; `routings` has one Routing a layer, in layer order."""

    routings: tuple[Routing, ...] | None = None


@dataclass
class UniPoolCausalLMOutput(_RoutedOutput, CausalLMOutputWithPast):
    """Output of UniPoolForCausalLM.

    `lm_loss` and `aux_loss` are the terms of `loss`: loss = lm_loss + aux_loss in training mode and
    loss = lm_loss in evaluation mode, where aux_loss is None. `routings` has one Routing a layer.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    routings: tuple[Routing, ...] | None = None


class UniPoolDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and mixture of experts; holds no expert and changes no state."""

    def __init__(self, config: UniPoolConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.router = _make_router(config, layer_idx)
        self.subset = None
        if config.layer_experts is not None:
            self.subset = ExpertSubset(config.visible_experts(layer_idx), config.num_experts)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        state: Tensor | None,
        experts: PoolPass,
        cell: nn.GRUCell | None = None,
        tokens: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor | None, ...]:
        """hidden_states [B, S, D]; tokens: flat ids of the T positions to route, None for all.

        state: [T, p] of the recurrent router in the layer below, and cell, its GRU; else None.
        Returns (hidden_states, state, *Routing). Reentrant checkpointing tracks gradients only
        through positional arguments and through tensors at the top level of the output.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        rows = x.flatten(0, 1)
        routed = rows if tokens is None else rows[tokens]
        router = self.router if cell is None else self.router.bind(cell, state)
        y, routing = pooled_moe(routed, lambda x: self._in_pool(router(x)), experts)
        if tokens is not None:
            y = torch.zeros_like(rows).index_copy(0, tokens, y.to(rows.dtype))
        return hidden_states + y.view_as(x), None if cell is None else router.state, *routing

    def _in_pool(self, routing: Routing) -> Routing:
        return routing if self.subset is None else self.subset(routing)


class UniPoolPreTrainedModel(PreTrainedModel):
    config_class = UniPoolConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["UniPoolDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": UniPoolDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        # The functions of `init` leave alone what a checkpoint has already filled.
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, NormRouter | SoftmaxRouter | RecurrentRouter):
            init.normal_(module.weight, std=std)
            if getattr(module, "scale", None) is not None:
                init.ones_(module.scale)
        elif isinstance(module, nn.GRUCell):
            for name, parameter in module.named_parameters():
                if name.startswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, std=std)
        elif isinstance(module, ExpertPool):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, PoolBalancer):
            init.zeros_(module.fraction)
        elif isinstance(module, ExpertSubset):
            module.reset_ids()


class UniPoolModel(UniPoolPreTrainedModel):
    """The backbone: embeddings, L layers, G pools; `layers[l]` uses `pools[config.pool_index(l)]`.

    With the recurrent router `router_cell` is the GRU of all layers, whatever pool they use. Its
    state goes up through the layers within one forward and is not kept: no cache holds it.

    Positions whose 2-D attention_mask is 0 are padding: no expert sees them, their MLP output is
    zero, and they count in no load, importance or balance loss. Looking for them makes the host
    wait for the device and breaks a compiled graph, so leave attention_mask out for packed batches.
    """

    def __init__(self, config: UniPoolConfig):
        config.validate()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            UniPoolDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.pools = nn.ModuleList(
            ExpertPool(
                config.num_experts,
                config.hidden_size,
                config.intermediate_size,
                config.weight_grad,
            )
            for _ in range(config.num_pools)
        )
        self.router_cell = None
        if config.router == "recurrent":
            self.router_cell = nn.GRUCell(config.router_state_size, config.router_state_size)
        self.balancers = nn.ModuleList(
            PoolBalancer(config.num_experts, config.balance_coefficient, config.balance_delay)
            for _ in balanced_layers(config)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> UniPoolModelOutput:
        """input_ids [B, S] or inputs_embeds [B, S, D]; returns the hidden states and the routings.

        Changes no state: whoever trains on the output calls `balance_loss(output.routings)` once.
        cache may be called past_key_values, the name of it before transformers 5.24.
        """
        check_arguments(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("UniPoolModel: give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen
            position_ids = position_ids.unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        tokens = _unpadded_tokens(attention_mask, *hidden_states.shape[:2])

        # Layers leave their weight gradients with the pass; see nn/pool_pass.py.
        passes = [pool() for pool in self.pools]
        routings = []
        state = None
        for index, layer in enumerate(self.layers):
            hidden_states, state, *routing = layer(
                hidden_states,
                state,
                cell=self.router_cell,
                experts=passes[self.config.pool_index(index)],
                tokens=tokens,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE: cache},
                **kwargs,
            )
            routings.append(Routing(*routing))
        return UniPoolModelOutput(
            last_hidden_state=self.norm(hidden_states),
            routings=tuple(routings),
            **{CACHE: cache},
        )

    def balance_loss(self, routings: tuple[Routing, ...]) -> Tensor:
        """Sum of the balance losses over pools, or over layers; zero when balance = "none".

        In training mode each call moves the balancers' state by one micro-batch, so call it once a
        micro-batch, after everything that may fail, and never inside a checkpointed region.
        """
        loss = routings[0].importance.new_zeros(())
        for balancer, layers in zip(self.balancers, balanced_layers(self.config), strict=True):
            loss = loss + balancer(
                [routings[index] for index in layers], self.config.num_experts_per_tok
            )
        return loss


class UniPoolForCausalLM(UniPoolPreTrainedModel, GenerationMixin):
    """UniPoolModel with a language-modelling head; loss = lm_loss + aux_loss while training.

    DistributedDataParallel needs no find_unused_parameters: a pool is two whole tensors, so every
    parameter is in the graph of every step, whatever the routing. It broadcasts rank 0's balance
    state to the other ranks before each forward. Reentrant checkpointing gives the same gradients
    but marks a pool ready once per layer, which DistributedDataParallel refuses: keep the default
    there.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: UniPoolConfig):
        super().__init__(config)
        self.model = UniPoolModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.balance_loss_is_added = False  # by who computes the loss of the logits
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> UniPoolCausalLMOutput:
        """As LlamaForCausalLM.forward: labels [B, S] are shifted here, -100 is ignored.

        logits_to_keep: number of last positions (0 for all), or the positions, that get logits.
        Without labels in training mode there is no loss, but aux_loss is given to add to one's own.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])

        lm_loss = aux_loss = loss = None
        share = 1.0
        if labels is not None:
            kwargs["num_items_in_batch"], share = targets_of_step(labels, **kwargs)
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if self.training:
            aux_loss = self.model.balance_loss(outputs.routings) * share
            outside = labels is None and kwargs.get("num_items_in_batch") is not None
            if outside and not self.balance_loss_is_added:
                warn_of_loss_outside()
        if lm_loss is not None:
            loss = lm_loss if aux_loss is None else lm_loss + aux_loss
        return UniPoolCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            aux_loss=aux_loss,
            routings=outputs.routings,
            **{CACHE: outputs.get(CACHE)},
        )


def _make_router(config: UniPoolConfig, layer: int) -> NormRouter | SoftmaxRouter | RecurrentRouter:
    seen = len(config.visible_experts(layer))
    sizes = (config.hidden_size, seen, config.num_experts_per_tok)
    if config.router == "norm":
        return NormRouter(*sizes)
    if config.router == "recurrent":
        return RecurrentRouter(
            *sizes,
            config.router_state_size,
            config.router_scoring,
            renormalize=config.norm_topk_prob,
        )
    return SoftmaxRouter(*sizes, renormalize=config.norm_topk_prob)


def balanced_layers(config: UniPoolConfig) -> list[list[int]]:
    """Layers that share a balance loss, one list for each loss."""
    layers = range(config.num_hidden_layers)
    if config.balance == "none":
        return []
    if config.balance == "layer":
        return [[layer] for layer in layers]
    return [
        [layer for layer in layers if config.pool_index(layer) == pool]
        for pool in range(config.num_pools)
    ]


def _unpadded_tokens(attention_mask, batch: int, length: int) -> Tensor | None:
    """Flat ids [T] of the positions that a 2-D mask [B, past + S] keeps; None if that is all."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    kept = attention_mask[:, -length:].expand(batch, length) != 0
    tokens = kept.flatten().nonzero().squeeze(1)
    return None if tokens.numel() == batch * length else tokens
