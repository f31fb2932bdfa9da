# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models; importing this package registers them with the Auto classes."""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        'unipool.models needs transformers >= 5.17: pip install "unipool[train]"'
    ) from error

from .configuration_unipool import UniPoolConfig
from .modeling_unipool import (
    UniPoolCausalLMOutput,
    UniPoolForCausalLM,
    UniPoolModel,
    UniPoolModelOutput,
    UniPoolPreTrainedModel,
)
from .presets import parameter_counts, preset, preset_names
from .saved_weights import register as register_saved_weights
from .trainer_loss import AddsBalanceLoss, BalanceLossWarning

AutoConfig.register(UniPoolConfig.model_type, UniPoolConfig, exist_ok=True)
AutoModel.register(UniPoolConfig, UniPoolModel, exist_ok=True)
AutoModelForCausalLM.register(UniPoolConfig, UniPoolForCausalLM, exist_ok=True)
# Whether a model shifts its labels, Trainer and pipelines know by the name of its class.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[UniPoolConfig.model_type] = UniPoolForCausalLM.__name__
register_saved_weights()

__all__ = [
    "AddsBalanceLoss",
    "BalanceLossWarning",
    "UniPoolCausalLMOutput",
    "UniPoolConfig",
    "UniPoolForCausalLM",
    "UniPoolModel",
    "UniPoolModelOutput",
    "UniPoolPreTrainedModel",
    "parameter_counts",
    "preset",
    "preset_names",
]
