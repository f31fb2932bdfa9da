# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models; importing this package registers them with the Auto classes."""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
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

AutoConfig.register(UniPoolConfig.model_type, UniPoolConfig, exist_ok=True)
AutoModel.register(UniPoolConfig, UniPoolModel, exist_ok=True)
AutoModelForCausalLM.register(UniPoolConfig, UniPoolForCausalLM, exist_ok=True)
register_saved_weights()

__all__ = [
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
