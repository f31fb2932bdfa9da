# SPDX-License-Identifier: Apache-2.0
"""The demo's figures, tables and files."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from rich.console import Console

from unipool.configs import DemoConfig
from unipool.errors import InputError
from unipool.report import runs as report
from unipool.training import demo

SCHEMA = {
    "name": str,
    "num_pools": int,
    "pool_size": int,
    "params_total": int,
    "params_expert": int,
    "params_active": int,
    "val_loss": float,
    "val_bits_per_byte": float,
    "train_loss": list,
    "tokens_per_second": float,
    "load": list,
}


def run(name="a <b>", layers=3, experts=5, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "name": name,
        "num_pools": 1,
        "pool_size": experts,
        "params_total": 1234567,
        "params_expert": 1000000,
        "params_active": 345678,
        "val_loss": 1.25 + seed,
        "val_bits_per_byte": 1.8,
        "train_loss": [[s, 5.0 / s] for s in range(1, 30)],
        "tokens_per_second": 4321.0,
        "load": draw.dirichlet(np.ones(experts), layers).tolist(),
    }


def shrink(patch):
    """The demo of smaller models, on less text."""
    training = {"seq_len": 64, "batch_size": 4, "eval_tokens": 2000, "log_every": 2}
    patch.setattr(demo, "SHAPE", demo.SHAPE | {"d_model": 32, "d_ff": 32})
    patch.setattr(demo, "TRAINING", demo.TRAINING | training)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The real demo on the real corpus, with few steps and small models."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        console = Console(file=open(folder / "output", "w"), width=80)  # noqa: SIM115
        options = {"config": DemoConfig(folder, 6, 1, "cpu"), "console": console}
        metrics = demo.run_demo(**options)
        console.file.flush()
        yield folder, metrics, options
        console.file.close()
    torch.set_num_threads(threads)


def test_demo_metrics_have_the_documented_schema(small_demo):
    folder, metrics, _ = small_demo
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert list(metrics) == ["runs", "torch", "unipool", "seed"]
    assert metrics["seed"] == 1
    assert metrics["torch"] == torch.__version__
    for entry in metrics["runs"]:
        assert {key: type(value) for key, value in entry.items()} == SCHEMA
        assert [step for step, _ in entry["train_loss"]] == [2, 4, 6]
        load = np.array(entry["load"])
        assert load.shape == (demo.LAYERS, entry["pool_size"])
        assert np.allclose(load.sum(1), 1)
        assert 2 < entry["val_loss"] < 7
        assert entry["val_bits_per_byte"] == pytest.approx(entry["val_loss"] / np.log(2), rel=1e-2)


def test_demo_compares_equal_active_sizes(small_demo):
    private, shared, half = small_demo[1]["runs"]
    assert (private["num_pools"], shared["num_pools"], half["num_pools"]) == (demo.LAYERS, 1, 1)
    assert private["params_expert"] == shared["params_expert"] == 2 * half["params_expert"]
    routers = 3 * demo.LAYERS * demo.LAYERS * 8 * 32  # routers see the whole pool
    assert abs(private["params_active"] - shared["params_active"]) < routers
    configs = demo.demo_configs(DemoConfig(steps=6, seed=1, device="cpu")).values()
    assert len({(c.seed, c.steps, c.lr, c.seq_len, c.d_model, c.d_ff) for c in configs}) == 1


def test_demo_writes_report_images_and_text(small_demo):
    folder, metrics, _ = small_demo
    names = {p.name for p in folder.glob("*.png")}
    assert names == {"loss.png", *(f"load-{r['name']}.png" for r in metrics["runs"])}
    output = (folder / "output").read_text()
    for run in metrics["runs"]:
        size = f"{run['name']} +{run['num_pools']} x {run['pool_size']} "
        row = next(line for line in output.splitlines() if re.match(" *" + size, line))
        assert f"{run['val_loss']:.4f}" in row
        assert f"{run['val_bits_per_byte']:.4f}" in row
        assert f"{run['params_total'] / 1e6:.2f}M" in row
        assert f"{run['tokens_per_second']:,.0f}" in row
    assert output.count(demo.PROMPT.strip()) >= 3
    assert str(folder / "report.html") in output.replace("\n", "")
    check_page((folder / "report.html").read_text(), images=4)


def test_demo_command_on_a_gpu(tmp_path, device, small_scale, monkeypatch):
    if device.type == "cpu":
        pytest.skip("the demo of the other tests is that of the CPU")
    pytest.importorskip("typer")
    from unipool import cli

    shrink(monkeypatch)
    out = tmp_path / "demo"
    command = ["demo", "--steps", "2", "--device", device.type, "--out", str(out)]
    assert cli.main(command) == 0
    assert len(json.loads((out / "metrics.json").read_text())["runs"]) == 3
    assert (out / "report.html").is_file()


def test_demo_resumes_and_clears_only_its_own(small_demo, tmp_path):
    _, metrics, options = small_demo
    again = demo.run_demo(**options, resume=True)
    assert again == metrics, "finished runs are read back, not trained again"
    other = tmp_path / "demo"
    (other / "half-pool").mkdir(parents=True)
    (other / "half-pool" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="half-pool is there and is no run of the demo"):
        demo.run_demo(DemoConfig(other), console=options["console"])
    assert (other / "half-pool" / "mine.txt").read_text() == "keep"


class Page(HTMLParser):
    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.cells, self.links = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        self.links += [v for k, v in attributes.items() if k in ("href", "src") and tag != "img"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def check_page(text, images):
    """Well-formed, nothing fetched from elsewhere, every image a PNG that decodes."""
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(page.images) == images
    for source in page.images:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        pixels = imread(BytesIO(base64.b64decode(data)))
        assert pixels.shape[0] > 200
        assert pixels.std() > 0.05, "an empty picture"
    return page


def test_page_shows_every_figure_and_escapes(tmp_path):
    runs = [run(), run("second", seed=1), run("dense") | {"load": None, "tokens_per_second": None}]
    metrics = {"runs": runs, "torch": "2.x", "unipool": "0.y", "seed": 7}
    path = report.write_report(tmp_path, "T & t", ["note <1>"], metrics, {"a <b>": "</pre><x>"})
    page = check_page(path.read_text(), images=3)
    assert page.cells == [cell for row in report.table_rows(runs) for cell in row]
    assert "a <b>" in page.cells
    assert "1,234,567" in page.cells
    assert "–" in page.cells
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "loss.png",
        "load-a-b-.png",
        "load-second.png",
    }


def test_loss_figure_draws_the_numbers():
    runs = [run(), run("second", seed=1)]
    axes = report.loss_figure(runs).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    for line, entry in zip(lines, runs, strict=True):
        assert line.get_xydata().tolist() == entry["train_loss"]
        assert line.get_label() == entry["name"]
    dots = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert [dot.get_ydata()[0] for dot in dots] == [r["val_loss"] for r in runs]
    low, high = axes.get_ylim()
    assert all(low < r["val_loss"] < high for r in runs)
    assert "nats" in axes.get_ylabel()
    assert axes.get_xlabel()


def test_loss_figure_without_a_finite_point():
    report.loss_figure([run() | {"train_loss": []}])
    report.loss_figure([run() | {"train_loss": [[1, float("nan")], [2, 3.0]]}])


def test_heat_map_shows_load_in_uniform_shares():
    entry = run(layers=2, experts=4) | {"load": [[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]}
    axes = report.load_figure(entry).axes[0]
    (image,) = axes.get_images()
    assert image.get_array().tolist() == [[4, 0, 0, 0], [1, 1, 1, 1]]
    assert image.get_clim() == (0, 4)


def test_reports_need_no_display():
    """In a process of its own: other libraries under test import pyplot."""
    code = """
import json, sys
from unipool.analysis import figures
from unipool.report import page
from unipool.report import runs as report
runs = json.loads(sys.argv[1])
page.png(report.loss_figure(runs))
page.png(report.load_figure(runs[0]))
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    command = [sys.executable, "-c", code, json.dumps([run()])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
