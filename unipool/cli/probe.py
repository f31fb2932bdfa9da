# SPDX-License-Identifier: Apache-2.0
"""`unipool probe` and `unipool analyze`; what they need is imported when they run."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

_Checkpoint = Annotated[
    Path, typer.Argument(help="run, checkpoint of one, or Hugging Face MoE model folder")
]
_Data = Annotated[
    list[Path] | None,
    typer.Option(help="text to look at; repeatable [what the run of the checkpoint held out]"),
]
_Field = Annotated[str, typer.Option(help="field of a .jsonl row, with --data")]
_SeqLen = Annotated[
    int | None, typer.Option(help="tokens a sequence [that of the run, else at most 512]", min=2)
]
_BatchSize = Annotated[int, typer.Option(help="sequences at a time", min=1)]
_Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to run")]


def probe(
    checkpoint: _Checkpoint,
    data: _Data = None,
    field: _Field = "text",
    layer: Annotated[
        list[int] | None, typer.Option(help="decoder layer to probe; repeatable [every MoE layer]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="random routings a layer", min=1)] = 3,
    weights: Annotated[
        Literal["rule", "kept"],
        typer.Option(help="of the random experts: by the router's rule, or those it chose itself"),
    ] = "rule",
    tokens: Annotated[int, typer.Option(help="tokens of text, 0: all", min=0)] = 1 << 15,
    seq_len: _SeqLen = None,
    batch_size: _BatchSize = 8,
    device: _Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
    plot: Annotated[Path | None, typer.Option(help="picture to write, .png")] = None,
) -> None:
    """Give one layer at a time random experts, and see what that costs."""
    from unipool.analysis.probe import run_probe
    from unipool.analysis.subject import load_subject
    from unipool.report.output import check_writable

    for path in (json_file, plot):
        check_writable(path)
    subject = load_subject(
        checkpoint,
        data,
        field=field,
        tokens=tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
    )
    result = run_probe(
        subject.model, subject.batches, layers=layer, seeds=range(seeds), weights=weights
    )
    _show_probe(result, subject)
    if json_file is not None:
        from unipool.files import write_text

        about = {"checkpoint": str(subject.folder), "text": subject.source}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, json.dumps(about | result.to_dict(), indent=1) + "\n")
    if plot is not None:
        from unipool.analysis.figures import probe_figure
        from unipool.report.page import png

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(png(probe_figure(result)))


def analyze(
    checkpoint: _Checkpoint,
    data: _Data = None,
    field: _Field = "text",
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("runs/analysis"),
    tokens: Annotated[int, typer.Option(help="tokens of text, 0: all", min=0)] = 1 << 16,
    shuffles: Annotated[
        int, typer.Option(help="random pairings of tokens, to compare layers with", min=1)
    ] = 3,
    seed: Annotated[int, typer.Option(help="of the pairings", min=0)] = 0,
    seq_len: _SeqLen = None,
    batch_size: _BatchSize = 8,
    device: _Device = "auto",
) -> None:
    """Describe what the routers of a model do: load, entropy, layers compared, experts compared."""
    from unipool.analysis.report import write_analysis
    from unipool.analysis.subject import load_subject
    from unipool.analysis.summary import analyze as analyze_model
    from unipool.report.output import check_writable

    check_writable(out / "report.html")
    subject = load_subject(
        checkpoint,
        data,
        field=field,
        tokens=tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
    )
    analysis = analyze_model(subject.model, subject.batches(), shuffles=shuffles, seed=seed)
    analysis.numbers.update(checkpoint=str(subject.folder), text=subject.source)
    numbers = analysis.numbers
    notes = [
        f"{numbers['model']} in {subject.folder}; {numbers['tokens']:,} tokens of text "
        f"({subject.source}); loss {numbers['loss']:.4f} nats a token, next-token accuracy "
        f"{numbers['accuracy']:.2%}."
    ]
    page = write_analysis(out, analysis, f"Routing of {checkpoint}", notes)
    print(notes[0])
    print(f"report: {page}")


def _show_probe(result, subject) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from unipool.report.tables import with_spread

    console = Console()
    console.print(
        f"{type(subject.model).__name__}: loss {result.loss:.4f} nats a token, accuracy "
        f"{result.accuracy:.2%}, over {result.tokens:,} tokens ({subject.source})",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("random layer", "loss (nats)", "accuracy (points)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in result.layers:
        points = None if entry.accuracy_spread is None else 100 * entry.accuracy_spread
        table.add_row(
            str(entry.layer),
            with_spread(entry.loss_increase, entry.loss_spread, "+.4f"),
            with_spread(-100 * entry.accuracy_drop, points, "+.2f"),
        )
    console.print(table)
    console.print(
        f"differences to the model as it is; mean ± standard deviation over {len(result.seeds)} "
        f"seed{'s' if len(result.seeds) > 1 else ''}; weights: {result.weights}",
        highlight=False,
        soft_wrap=True,
    )
