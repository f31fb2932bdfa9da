# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model, loaded from a run, a checkpoint or a Hugging Face folder."""

from pathlib import Path

import torch

from unipool.training.checkpoint import MANIFEST, folder_fault, latest_checkpoint
from unipool.training.errors import InputError
from unipool.training.tokenizer import load_hugging_face


def find_model(path: Path) -> Path:
    """The folder to load: `path` itself, or the model or newest checkpoint of a run folder."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"model: {path} is not a folder")
    if (path / "model").is_dir():
        path = path / "model"
    elif newest := latest_checkpoint(path / "checkpoints"):
        path = newest
    if (
        not (path / "model.safetensors.index.json").exists()
        and not (path / "model.safetensors").exists()
    ):
        raise InputError(f"model: {path} holds neither a model nor a run with a checkpoint")
    if (path / MANIFEST).exists() and (fault := folder_fault(path)):
        raise InputError(f"model: {path} is damaged: {fault}")
    return path


def load_model(path: Path, device: str = "cpu"):
    """(model in evaluation mode, tokenizer) of `find_model(path)`."""
    import transformers

    import unipool.models  # noqa: F401  (registers UniPool with the Auto classes)

    folder = find_model(path)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model: cannot load {folder}: {reason}") from error
    return model.to(device).eval(), load_hugging_face(folder)


@torch.no_grad()
def generate_text(
    model, tokenizer, prompt: str, max_new_tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """`prompt` and what the model writes after it. temperature 0: the likeliest token each time.

    Sampling draws from its own seed and leaves PyTorch's generators as they were.
    """
    device = next(model.parameters()).device
    start = tokenizer.eos_token or tokenizer.bos_token
    ids = tokenizer(prompt or start or "", return_tensors="pt", add_special_tokens=False).input_ids
    if ids.numel() == 0:
        raise InputError("--prompt must not be empty: the tokenizer has no token to begin with")
    sampling = {"do_sample": True, "temperature": temperature}
    padding = list(range(len(tokenizer), model.config.vocab_size))  # ids that mean nothing
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        output = model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=model.config.eos_token_id,
            suppress_tokens=padding or None,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
