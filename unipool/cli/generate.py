# SPDX-License-Identifier: Apache-2.0
"""`unipool generate`."""

from unipool.checkpoints import find_model
from unipool.cli.options import TrustRemoteCode, command
from unipool.configs import GenerateConfig
from unipool.terminal import say


@command(GenerateConfig)
def generate(given: dict, trust_remote_code: TrustRemoteCode = False) -> None:
    """Write some text with a trained model."""
    config = GenerateConfig(**given)
    # Before the slow imports, so that a wrong path shows at once.
    find_model(config.model, trust_remote_code)
    from unipool.models.generation import generate

    say(generate(config, trust_remote_code), lines=True)
