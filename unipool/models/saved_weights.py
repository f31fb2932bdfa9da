# SPDX-License-Identifier: Apache-2.0
"""Weights that were saved in another form than the model has them in."""

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .configuration_unipool import UniPoolConfig


class AtLeastOneDimension(ConversionOps):
    """Scalars as tensors of one element."""

    def convert(self, input_dict: dict[str, Tensor | list[Tensor]], **_) -> dict[str, Tensor]:
        found = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        return {name: v.reshape(1) if v.dim() == 0 else v for name, v in found.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def register() -> None:
    """Lets `from_pretrained` take routers whose scale was saved with shape ()."""
    scale = WeightConverter("router.scale", "router.scale", [AtLeastOneDimension()])
    register_checkpoint_conversion_mapping(UniPoolConfig.model_type, [scale], overwrite=True)
