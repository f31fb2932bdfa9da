# SPDX-License-Identifier: Apache-2.0
"""`unipool probe`."""

from unipool.cli.options import TrustRemoteCode, command
from unipool.configs import ProbeConfig
from unipool.terminal import say


@command(ProbeConfig)
def probe(given: dict, trust_remote_code: TrustRemoteCode = False) -> None:
    """Give one layer at a time random experts, and see what that costs."""
    config = ProbeConfig(**given)
    from unipool.analysis.run import probe_checkpoint

    result, subject = probe_checkpoint(config, trust_remote_code)
    _show(result, subject)


def _show(result, subject) -> None:
    from rich.console import Console

    from unipool.report.tables import add_row, terminal, with_spread

    console = Console()
    say(
        f"{type(subject.model).__name__}: loss {result.loss:.4f} nats per token, accuracy "
        f"{result.accuracy:.2%}, over {result.tokens:,} tokens ({subject.source})",
        console,
    )
    table = terminal(("random layer", "loss (nats)", "accuracy (points)"))
    for entry in result.layers:
        points = None if entry.accuracy_spread is None else 100 * entry.accuracy_spread
        add_row(
            table,
            str(entry.layer),
            with_spread(entry.loss_increase, entry.loss_spread, "+.4f"),
            with_spread(-100 * entry.accuracy_drop, points, "+.2f"),
        )
    console.print(table)
    say(
        f"differences to the model as it is; mean ± standard deviation over {len(result.seeds)} "
        f"seed{'s' if len(result.seeds) > 1 else ''}; weights: {result.weights}",
        console,
    )
