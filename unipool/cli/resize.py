# SPDX-License-Identifier: Apache-2.0
"""`unipool resize`."""

from unipool.checkpoints import find_model
from unipool.cli.options import command
from unipool.configs import ResizeConfig
from unipool.terminal import say


@command(ResizeConfig)
def resize(given: dict) -> None:
    """Add experts to the pools, or drop some; a checkpoint's optimizer goes along."""
    config = ResizeConfig(**given)
    find_model(config.source)  # before the slow imports, so that a wrong path shows at once
    from unipool.models.folders import resize_folder

    for pool, origin in enumerate(resize_folder(config)):
        say(f"pool {pool}: experts {_runs(origin)} of before")
    say(f"model: {config.out}")


def _runs(origin: list[int]) -> str:
    """[0, 1, 2, 5, -1] -> "0-2 5 new"."""
    runs: list[list[int]] = []
    for expert in origin:
        if expert >= 0 and runs and runs[-1][-1] == expert - 1:
            runs[-1][1:] = [expert]
        else:
            runs.append([expert])
    return " ".join(
        "new" if run[0] < 0 else "-".join(str(expert) for expert in run) for run in runs
    )
