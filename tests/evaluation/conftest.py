# SPDX-License-Identifier: Apache-2.0
"""Models, files and a wide terminal for the tests of `unipool eval`."""

from importlib.util import find_spec

import eval_sets
import pytest

if any(find_spec(package) is None for package in ("lm_eval", "typer", "transformers")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, small_scale):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from eval_runs import train

    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    import torch
    from eval_runs import save
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(2)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**sizes, max_position_embeddings=512, initializer_range=0.1)
    return save(tmp_path_factory.mktemp("mixtral") / "hf", MixtralForCausalLM(config))


@pytest.fixture(scope="module")
def rows():
    return eval_sets.make_rows()


@pytest.fixture(scope="module")
def sets(tmp_path_factory, rows):
    return eval_sets.write_rows(tmp_path_factory.mktemp("sets") / "local", rows)
