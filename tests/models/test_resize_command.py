# SPDX-License-Identifier: Apache-2.0
"""`unipool resize`."""

import json
import shutil

import pytest
import torch
from commands import output, refusal
from resized import make_trained
from small_models import make_ids

from unipool.models import UniPoolForCausalLM

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of `unipool train`, with its optimizer."""
    pytest.importorskip("typer")
    from unipool import cli
    from unipool.files import latest_checkpoint

    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(300)))
    sizes = "--d-model 32 --d-ff 32 --layers 2 --heads 2 --pool-size 4 --seq-len 32 --batch-size 4"
    run = f"--steps 3 --eval-tokens 128 --device cpu --data {text} --out {tmp_path / 'run'}"
    assert cli.main(["train", *sizes.split(), *run.split()]) == 0
    return latest_checkpoint(tmp_path / "run" / "checkpoints")


@pytest.mark.any_device
def test_command_resizes_a_checkpoint_with_its_optimizer(checkpoint, tmp_path, capsys):
    from unipool.files import folder_fault

    out = tmp_path / "grown" / "step-3"
    said = output(capsys, "resize", checkpoint, out, "--experts", "6", "--ids", "1,3")
    assert "pool 0: experts 0-3 1 3 of before" in said
    assert folder_fault(out) is None
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in out.iterdir()}
    before, after = (UniPoolForCausalLM.from_pretrained(path) for path in (checkpoint, out))
    assert torch.equal(after(make_ids()).logits, before(make_ids()).logits)
    states = [torch.load(path / "optimizer.pt")["state"] for path in (checkpoint, out)]
    names = [n for n, p in after.named_parameters() if p.ndim >= 2]
    index = names.index("model.pools.0.down_proj")
    old, new = (state[index] for state in states)
    assert torch.equal(new["exp_avg"], old["exp_avg"][[0, 1, 2, 3, 1, 3]])
    assert new["exp_avg"].abs().max() > 0
    assert new["step"] == 3


@pytest.mark.any_device
def test_a_run_goes_on_from_a_resized_checkpoint(checkpoint, tmp_path, capsys):
    """The run's options still say four experts; what counts is the checkpoint's model."""
    from unipool.training.metrics import read_metrics

    run, grown = checkpoint.parent.parent, tmp_path / "grown"
    resized = grown / "checkpoints" / checkpoint.name
    resized.parent.mkdir(parents=True)
    for name in ("config.json", "data.key", "metrics.jsonl"):
        shutil.copy2(run / name, grown / name)
    output(capsys, "resize", checkpoint, resized, "--experts", "6")
    assert "from step 3" in output(capsys, "train", "--resume", "--out", grown, "--steps", "8")
    assert read_metrics(grown / "metrics.jsonl")[-1]["step"] == 8
    before, after = (UniPoolForCausalLM.from_pretrained(p) for p in (resized, grown / "model"))
    assert after.config.num_experts == 6
    old, new = (m.model.pools[0].down_proj.detach() for m in (before, after))
    assert new.shape == (6, 32, 32)
    assert not torch.equal(new, old)
    saved = torch.load(grown / "checkpoints" / "step-8" / "optimizer.pt")["state"]
    assert {state["step"].item() for state in saved.values()} == {8.0}


@pytest.mark.any_device
def test_command_drops_by_a_load_from_a_file(checkpoint, tmp_path, capsys):

    load = tmp_path / "load.json"
    load.write_text(json.dumps([[5, 0, 7, 1], [1, 0, 3, 9]]))
    arguments = ["resize", checkpoint.parent.parent, tmp_path / "small"]
    said = output(capsys, *arguments, "--experts", "3", "--load", load)
    assert "pool 0: experts 0 2-3 of before" in said


@pytest.mark.any_device
def test_command_refuses_in_one_line(checkpoint, tmp_path, capsys):

    broken = tmp_path / "broken.json"
    broken.write_text('{"load": 1}')
    for arguments, message in [
        (["--experts", "4"], "num_experts must be a positive integer other than M=4"),
        (["--experts", "0"], "--experts"),
        (["--experts", "5", "--ids", "one"], "--ids must be numbers"),
        (["--experts", "5", "--ids", "1,2"], "experts must be 1 ids"),
        (["--experts", "5", "--load", str(broken)], "must be JSON"),
        (["--experts", "5", "--load", "nowhere"], "--load nowhere"),
    ]:
        assert message in refusal(capsys, "resize", checkpoint, tmp_path / "new", *arguments)
        assert not (tmp_path / "new").exists()


@pytest.mark.any_device
def test_command_refuses_damaged_and_foreign_files_in_one_line(tmp_path, capsys):
    pytest.importorskip("typer")

    model, optimizer = make_trained()
    model.save_pretrained(tmp_path / "one")
    for content, message in [
        (b"not a file of torch", "cannot be read as an optimizer's state"),
        (optimizer.state_dict(), "is not the optimizer of `unipool train`"),
        (None, ""),
    ]:
        path = tmp_path / "one" / "optimizer.pt"
        if content is None:  # now the weights
            path.unlink()
            path = tmp_path / "one" / "model.safetensors"
            content = path.read_bytes()[:1000]
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        arguments = [tmp_path / "one", tmp_path / "new", "--experts", "7", "--ids", "1"]
        assert message in refusal(capsys, "resize", *arguments)
        assert not (tmp_path / "new").exists()
