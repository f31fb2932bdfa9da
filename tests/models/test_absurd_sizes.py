# SPDX-License-Identifier: Apache-2.0
"""Sizes that no machine has are refused by arithmetic: at once, and in little memory."""

import json
import resource

import pytest
from model_folders import change_json, write_model
from transformers import LlamaConfig

pytest.importorskip("typer")

from unipool import cli
from unipool.errors import InputError
from unipool.models import UniPoolConfig, parameter_counts, preset
from unipool.models import memory as memory_of_models
from unipool.models.memory import check_memory, memory_of
from unipool.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("small_scale")
MOST = 1 << 20  # KiB that saying no may take; what it needs to import is well below


@pytest.fixture(autouse=True)
def little_memory_and_time():
    """Processor time of this process, not what a clock on the wall says of a busy machine."""
    begin = resource.getrusage(resource.RUSAGE_SELF)
    yield
    end = resource.getrusage(resource.RUSAGE_SELF)
    assert end.ru_maxrss - begin.ru_maxrss < MOST
    assert end.ru_utime - begin.ru_utime < 60


HUGE = [10**7, 10**9, 1 << 31, 1 << 63, 10**40]
SIZES = ["num_hidden_layers", "num_experts", "hidden_size", "intermediate_size", "vocab_size"]
SIZES += ["num_attention_heads", "num_key_value_heads", "head_dim", "num_pools"]


@pytest.mark.parametrize("size", HUGE[1:], ids=lambda n: f"{float(n):g}")
@pytest.mark.parametrize("name", [*SIZES, "num_experts_per_tok", "router_state_size"])
def test_configurations(name, size):
    with pytest.raises(ValueError, match=r"UniPoolConfig: \w+ must be .*got \d|2\*\*44") as caught:
        UniPoolConfig(**{"router": "recurrent", name: size})
    assert "\n" not in str(caught.value)


def test_layers_and_experts_have_a_limit_of_their_own():
    with pytest.raises(ValueError, match="num_hidden_layers must be at most 4096, got 10000000"):
        UniPoolConfig(num_hidden_layers=10**7)
    with pytest.raises(ValueError, match="num_experts must be at most 65536, got 1000000000"):
        UniPoolConfig(num_experts=10**9)
    with pytest.raises(ValueError, match=r"at most 2\*\*44 parameters, got 1.9e\+15"):
        UniPoolConfig(num_hidden_layers=4096, num_pools=4096, num_experts=65536)
    with pytest.raises(ValueError, match="an integer of 33220 bits"):
        UniPoolConfig(hidden_size=10**10000)


def test_the_largest_published_sizes_are_far_below():
    for form in ("dense", "vanilla", "unipool"):
        preset("978m", form)
    sizes = {"hidden_size": 7168, "intermediate_size": 2048, "num_hidden_layers": 61}
    UniPoolConfig(**sizes, num_experts=61 * 256, num_attention_heads=56, head_dim=128)


@pytest.mark.parametrize("form", ["dense", "vanilla", "unipool"])
@pytest.mark.parametrize("name", SIZES[:5])
def test_presets(form, name):
    if form == "dense" and name == "num_experts":
        pytest.skip("a dense model has none")
    with pytest.raises(ValueError, match=r"must be at most|parameters"):
        preset("tiny", form, **{name: 10**9})


def test_parameters_are_counted_without_lists():
    config = UniPoolConfig(num_hidden_layers=4096, num_experts=65536, hidden_size=64, head_dim=64)
    counts = parameter_counts(config)
    assert counts["expert"] == 65536 * 3 * 64 * 3072
    assert counts["total"] > counts["expert"] + 4096 * 65536 * 64


def test_memory_is_compared_with_what_the_machine_has(monkeypatch):
    config = preset("tiny")
    total = parameter_counts(config)["total"]
    monkeypatch.setattr(memory_of_models, "memory_of", lambda _: total * 16 + 100)
    check_memory(config, "cpu", 16, 100)
    with pytest.raises(InputError, match=r"needs at least .* GB with this batch; cpu has"):
        check_memory(config, "cpu", 16, 101)


def test_the_memory_of_this_machine_is_known():
    assert memory_of("cpu") > 1 << 28


def one_error(capsys, *command):
    assert cli.main(list(command)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


ABSURD = ["--layers=10000000", "--pool-size=1000000000", "--d-model=16777216", "--d-ff=1000000000"]
ABSURD += ["--num-pools=1000000000", "--batch-size=1000000000", "--accumulate=1000000000000"]
ABSURD += ["--router-state-size=1000000000", "--heads=1000000000", "--kv-heads=1000000000"]
ABSURD += [
    f"--steps={10**30}",
    f"--batch-size={1 << 61}",
    f"--seq-len={10**15}",
    f"--keep={1 << 70}",
]
ABSURD += [f"--save-every={'9' * 5000}", f"--layers={'9' * 4000}", f"--lr=1{'0' * 400}"]


@pytest.mark.parametrize("option", ABSURD, ids=lambda text: text[:30])
def test_options_of_train(text, tmp_path, capsys, option):
    given = ["--router=recurrent"] if "state" in option else []
    out = tmp_path / "out"
    one_error(capsys, "train", f"--data={text}", f"--out={out}", "--device=cpu", option, *given)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--pool-size=1000000000"],
        [f"--pool-size={10**30}"],
        ["--pools=1000000000"],
        ["--pools=1", "--batch-size=1000000000"],
        ["--pools=1", f"--steps={10**40}"],
        ["--preset=main", f"--seeds=0,{10**30}"],
        ["--granularity=1000000000"],
    ],
)
def test_options_of_compare(text, tmp_path, capsys, options):
    out = tmp_path / "out"
    one_error(capsys, "compare", f"--data={text}", f"--out={out}", "--device=cpu", *options)
    assert not out.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize(
    "options",
    [
        ["generate", "MODEL", f"--max-new-tokens={10**12}"],
        ["probe", "MODEL", "--data=TEXT", f"--seeds={10**9}"],
        ["analyze", "MODEL", "--data=TEXT", f"--shuffles={10**9}", "--out=OUT"],
        ["resize", "MODEL", "OUT", f"--experts={10**9}", "--add=init"],
        ["resize", "MODEL", "OUT", f"--experts={10**9}"],
        ["probe", "MODEL", "--data=TEXT", f"--seq-len={10**12}"],
        ["eval", "MODEL", f"--limit={10**30}"],
        ["demo", f"--steps={10**30}", "--out=OUT"],
    ],
    ids=lambda options: f"{options[0]} {options[-1]}",
)
def test_options_of_other_commands(model, text, tmp_path, capsys, options):
    places = {"MODEL": str(model), "--data=TEXT": f"--data={text}", "OUT": str(tmp_path / "out")}
    places["--out=OUT"] = f"--out={tmp_path / 'out'}"
    one_error(capsys, *(places.get(option, option) for option in options))
    assert not (tmp_path / "out").exists()


def test_growth_beyond_the_memory_is_refused_before_it_begins(model, tmp_path, capsys, monkeypatch):
    size = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr(memory_of_models, "memory_of", lambda _: 2 * size)
    out = str(tmp_path / "out")
    error = one_error(capsys, "resize", str(model), out, "--experts=60000", "--add=init")
    assert "GB with this batch; cpu has" in error


@pytest.mark.parametrize("command", ["generate", "convert", "resize", "probe"])
@pytest.mark.parametrize("size", HUGE, ids=lambda n: f"{float(n):g}")
@pytest.mark.parametrize("name", SIZES[:5])
def test_configurations_in_folders(model, text, tmp_path, capsys, name, size, command):
    folder, out = tmp_path / "model", str(tmp_path / "out")
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path) if path.suffix == ".safetensors" else (
            folder / path.name
        ).write_bytes(path.read_bytes())
    if command in ("convert", "resize"):
        (folder / "model.safetensors").unlink()
        content = (model / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content)
    change_json(folder / "config.json", **{name: size})
    more = {
        "generate": [],
        "convert": [out, "--to=private"],
        "resize": [out, "--experts=6"],
        "probe": [f"--data={text}"],
    }
    error = one_error(capsys, command, str(folder), *more[command])
    assert "cannot hold" in error or "must be at most" in error or "2**44" in error


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_configurations_of_other_kinds(model, tmp_path, capsys, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    values = LlamaConfig(num_hidden_layers=10**7, hidden_size=4096).to_dict()
    (folder / "config.json").write_text(json.dumps(values | {"model_type": kind}))
    assert "cannot hold" in one_error(capsys, "generate", str(folder))


def test_beams_are_bounded(model, tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    change_json(folder / "generation_config.json", num_beams=10**9)
    assert "num_beams in " in one_error(capsys, "generate", str(folder))


def test_a_run_of_more_tokens_than_can_be_counted():
    with pytest.raises(InputError, match=r"below 2\*\*62 tokens in all, got 4.72e\+21"):
        TrainConfig(steps=1 << 40, batch_size=1 << 20, seq_len=1 << 12)
