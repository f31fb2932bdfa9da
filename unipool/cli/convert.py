# SPDX-License-Identifier: Apache-2.0
"""`unipool convert`."""

from unipool.checkpoints import find_model
from unipool.cli.options import command
from unipool.configs import ConvertConfig
from unipool.terminal import say


@command(ConvertConfig)
def convert(given: dict) -> None:
    """Turn layer-private experts into one pool, or back; the outputs stay the same."""
    config = ConvertConfig(**given)
    find_model(config.source)  # before the slow imports, so that a wrong path shows at once
    from unipool.models.folders import convert_folder

    say(f"model: {config.out} ({_pools(convert_folder(config))})")


def _pools(config) -> str:
    if config.model_type == "mixtral":
        return f"Mixtral of {config.num_hidden_layers} x {config.num_local_experts} experts"
    return f"{config.num_pools} x {config.num_experts} experts"
