# SPDX-License-Identifier: Apache-2.0
"""The fuzzer finds what is planted, repeats it by one command, and finds nothing in the ops."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fuzz
import fuzz_calls
import pytest
import torch
from fuzz_calls import FindingError, Target, run_call

pytestmark = pytest.mark.any_device
RAW = fuzz_calls.raw_targets()
PUBLIC = fuzz_calls.public_targets()
CRASHES = """
import ctypes
from dataclasses import replace

import fuzz_calls
import torch

permute = fuzz_calls.raw_targets()["unipool::permute"]


def call(x, order, top_k):
    if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[0] > 30:
        ctypes.string_at(0)
    return permute.call(x, order, top_k)


targets = {"toy::permute": replace(permute, name="toy::permute", call=call)}
"""


@pytest.fixture(autouse=True)
def _settings_of_torch(one_thread):
    """A call sets the number of threads and poisons memory."""
    yield
    torch.use_deterministic_algorithms(False)


def findings(target: Target, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        try:
            run_call(target, seed)
        except FindingError as finding:
            found.append(str(finding))
    return found


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, fuzz.__file__, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("name", [*RAW, *PUBLIC])
def test_nothing_is_found_in_the_ops(name):
    assert not findings((RAW | PUBLIC)[name], range(1000, 1030))


def test_every_op_is_called():
    assert fuzz_calls.uncovered(RAW | PUBLIC) == []
    without = {n: t for n, t in (RAW | PUBLIC).items() if n != "unipool::permute"}
    assert fuzz_calls.uncovered(without) == ["unipool::permute"]
    bare = {**RAW, **PUBLIC, "permute": replace(PUBLIC["permute"], specs=())}
    assert fuzz_calls.uncovered(bare) == ["permute"]


@pytest.mark.parametrize("name", ["unipool::grouped_mm", "unipool::router_logits", "grouped_mm"])
def test_a_wrong_result_is_found(name):
    target = (RAW | PUBLIC)[name]

    def wrong(*arguments):
        result = target.call(*arguments)
        if result.numel():
            with torch.no_grad():
                result[-1, -1] += 1
        return result

    assert any("off by" in text for text in findings(replace(target, call=wrong), range(30)))


def test_a_wrong_id_is_found():
    target = RAW["unipool::softmax_topk"]

    def wrong(*arguments):
        weights, experts, *rest = target.call(*arguments)
        return weights, experts.flip(1), *rest

    found = findings(replace(target, call=wrong), range(30))
    assert any("wrong values" in text for text in found)


def test_a_silent_acceptance_is_found():
    target = RAW["unipool::permute"]

    def lenient(x, order, top_k):
        return target.call(x, order.int() if isinstance(order, torch.Tensor) else order, top_k)

    found = findings(replace(target, call=lenient), range(200))
    assert any(re.match("accepted, though order is torch", text) for text in found)


def test_a_changed_input_is_found():
    target = RAW["unipool::router_logits"]

    def careless(x, weight):
        result = target.call(x, weight)
        if not x.is_meta:
            x.detach().mul_(2)
        return result

    assert any("changed x" in f for f in findings(replace(target, call=careless), range(30)))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IndexError("list index out of range"), "raised IndexError"),
        (ValueError("two\nlines"), "more than one clear line"),
        (ValueError("x must be [T, D]"), "refused, though valid"),
    ],
)
def test_an_unclear_or_wrong_refusal_is_found(error, said):
    def refuse(*arguments):
        raise error

    found = findings(replace(RAW["unipool::permute"], call=refuse), range(30))
    assert any(said in text for text in found)


def test_a_crash_is_survived_and_repeated_by_the_command_that_is_printed(tmp_path):
    toy, counts = tmp_path / "toy.py", tmp_path / "counts.json"
    toy.write_text(CRASHES)
    options = ("--also", toy, "--op", "toy::permute", "--op", "unipool::permute")
    run = command(*options, "--calls", 40, "--json", counts)
    assert run.returncode == 1, run.stderr
    result = json.loads(counts.read_text())
    crashes = result["ops"]["toy::permute"]["finding"]
    assert 0 < crashes < 20
    assert result["calls"] == 40
    assert result["ops"]["unipool::permute"]["finding"] == 0
    assert run.stdout.count("the process died or hung, exit status -11") == crashes
    repeat = re.search(r"--repeat (toy::permute:\d+)", run.stdout)[1]
    assert command("--also", toy, "--repeat", repeat).returncode == -11
    assert command("--repeat", "unipool::permute:0").returncode == 0


def test_counts_add_up_and_an_unknown_op_is_one_line(tmp_path):
    counts = tmp_path / "counts.json"
    run = command("--calls", 60, "--json", counts)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(counts.read_text())
    kinds = ("compared", "refused", "done", "finding")
    assert result["calls"] == sum(result[kind] for kind in kinds) == 60
    assert result["ops"].keys() == RAW.keys() | PUBLIC.keys()
    assert all(op["calls"] == sum(op[kind] for kind in kinds) for op in result["ops"].values())
    unknown = command("--op", "nothing")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("fuzz: no op nothing; there are unipool::router_logits")
    assert Path(fuzz.__file__).name == "fuzz.py"
