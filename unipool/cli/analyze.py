# SPDX-License-Identifier: Apache-2.0
"""`unipool analyze`."""

from unipool.cli.options import TrustRemoteCode, command
from unipool.configs import AnalyzeConfig
from unipool.terminal import say


@command(AnalyzeConfig)
def analyze(given: dict, trust_remote_code: TrustRemoteCode = False) -> None:
    """Describe what the routers of a model do: load, entropy, layers compared, experts compared."""
    config = AnalyzeConfig(**given)
    from unipool.analysis.run import analyze_checkpoint

    page, summary = analyze_checkpoint(config, trust_remote_code)
    say(summary)
    say(f"report: {page}")
