# SPDX-License-Identifier: Apache-2.0
"""`unipool eval`."""

from unipool.cli.options import TrustRemoteCode, command
from unipool.configs import EvalConfig
from unipool.terminal import say


@command(EvalConfig)
def evaluate(given: dict, trust_remote_code: TrustRemoteCode = False) -> None:
    """Score a model on zero-shot tasks, with lm-evaluation-harness."""
    config = EvalConfig(**given)
    from unipool.evaluation.run import run_evaluation
    from unipool.report.output import write_json

    about, scores = run_evaluation(config, trust_remote_code)
    _show(about, scores)
    if config.json is not None:
        write_json(config.json, about | scores.to_dict())


def _show(about: dict, scores) -> None:
    from rich.console import Console

    from unipool.report.tables import add_row, terminal

    def shown(value: float) -> str:
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"

    def values(entry) -> tuple[str, str]:
        return shown(entry.value), "" if entry.stderr is None else f"± {shown(entry.stderr)}"

    console = Console()
    say(
        f"{about['model']}, lm-eval {scores.lm_eval}, zero-shot, at most {about['max_length']} "
        f"tokens; data: {about['data']}",
        console,
    )
    table = terminal(("task", "metric", "value", "", "n"), left=("task", "metric"))
    for score in scores.tasks:
        for metric, found in score.metrics.items():
            add_row(table, score.task, metric, *values(found), str(score.docs))
    table.add_section()
    for metric, mean in scores.averages.items():
        add_row(table, "average", metric, *values(mean), f"{len(mean.tasks)} tasks")
    console.print(table)
    if scores.averages:
        say(
            "average: unweighted, of each task's acc; acc_norm: of acc_norm where a task has it",
            console,
        )
    for score in scores.tasks:
        if score.cut:
            say(
                f"{score.task}: {score.cut} of {score.requests} requests were longer than "
                f"{about['max_length']} tokens and lost their beginning",
                console,
            )
