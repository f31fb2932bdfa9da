# SPDX-License-Identifier: Apache-2.0
"""The probe and the analysis of the model in a folder, with their files."""

from pathlib import Path

from unipool.analysis.probe import Probe, run_probe
from unipool.analysis.report import write_analysis
from unipool.analysis.subject import Subject, load_subject
from unipool.analysis.summary import analyze
from unipool.configs import AnalyzeConfig, ProbeConfig
from unipool.files import write_bytes
from unipool.report.output import check_writable, write_json


def probe_checkpoint(config: ProbeConfig, trust_remote_code: bool = False) -> tuple[Probe, Subject]:
    """Probe a model, and write the numbers and the picture where the options say. InputError."""
    for path in (config.json, config.plot):
        check_writable(path)
    subject = _subject(config, trust_remote_code)
    result = run_probe(
        subject.model,
        subject.batches,
        layers=config.layer,
        seeds=range(config.seeds),
        weights=config.weights,
    )
    if config.json is not None:
        about = {"checkpoint": str(subject.folder), "text": subject.source}
        write_json(config.json, about | result.to_dict())
    if config.plot is not None:
        from unipool.analysis.figures import probe_figure
        from unipool.report.page import png

        config.plot.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(config.plot, png(probe_figure(result)))
    return result, subject


def analyze_checkpoint(config: AnalyzeConfig, trust_remote_code: bool = False) -> tuple[Path, str]:
    """Write the report of a model's routing; its path, and a sentence on the model. InputError."""
    check_writable(config.out / "report.html")
    subject = _subject(config, trust_remote_code)
    analysis = analyze(subject.model, subject.batches(), shuffles=config.shuffles, seed=config.seed)
    numbers = analysis.numbers
    numbers.update(checkpoint=str(subject.folder), text=subject.source)
    summary = (
        f"{numbers['model']} in {subject.folder}; {numbers['tokens']:,} tokens of text "
        f"({subject.source}); loss {numbers['loss']:.4f} nats per token, next-token accuracy "
        f"{numbers['accuracy']:.2%}."
    )
    page = write_analysis(config.out, analysis, f"Routing of {config.checkpoint}", [summary])
    return page, summary


def _subject(config: ProbeConfig | AnalyzeConfig, trust_remote_code: bool) -> Subject:
    return load_subject(
        config.checkpoint,
        config.data,
        field=config.field,
        tokens=config.tokens,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        device=config.device,
        trust_remote_code=trust_remote_code,
    )
