# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model."""

import torch

from unipool.configs import GenerateConfig
from unipool.data.tokenizer import unused_ids
from unipool.errors import InputError
from unipool.models.loading import load_model, resolve_device


def generate(config: GenerateConfig, trust_remote_code: bool = False) -> str:
    """The prompt, and what the model of a folder writes after it. Raises InputError."""
    device = resolve_device(config.device)
    model, tokenizer = load_model(config.model, device, trust_remote_code)
    return generate_text(
        model, tokenizer, config.prompt, config.max_new_tokens, config.temperature, config.seed
    )


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
    padding = unused_ids(tokenizer, model.config.vocab_size)
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
