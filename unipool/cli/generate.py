# SPDX-License-Identifier: Apache-2.0
"""`unipool generate`."""

from unipool.checkpoints import find_model
from unipool.cli.options import command
from unipool.configs import GenerateConfig


@command(GenerateConfig)
def generate(given: dict) -> None:
    """Write some text with a trained model."""
    config = GenerateConfig(**given)
    find_model(config.model)  # before the slow imports, so that a wrong path shows at once
    from unipool.models.generation import generate

    print(generate(config))
