# SPDX-License-Identifier: Apache-2.0
"""A model that was saved in float16 runs on the CPU, whose ops take none: in float32, exactly."""

import pytest
import torch

pytest.importorskip("transformers")

from model_folders import write_model
from small_models import make_ids

from unipool.models import UniPoolForCausalLM
from unipool.models.loading import load_model

pytestmark = pytest.mark.any_device


def test_a_folder_in_float16(tmp_path):
    folder = write_model(tmp_path / "model")
    UniPoolForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    loaded, _ = load_model(folder)
    assert loaded.dtype == torch.float32
    ids = make_ids(2, 9).cpu()
    due = UniPoolForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert loaded(ids).logits.equal(due(ids).logits)
