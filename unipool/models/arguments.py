# SPDX-License-Identifier: Apache-2.0
"""What a model's forward takes, whichever supported release of transformers is installed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import LlamaForCausalLM
from transformers.utils import TransformersKwargs

# The library's name of the argument, and of the output, that holds keys and values: `cache` since
# 5.24. generate() gives it by this name, and attention, masks and checkpointing look for it.
CACHE = "cache"
if CACHE not in inspect.signature(LlamaForCausalLM.forward).parameters:
    CACHE = "past_key_values"
_NAMES = ("cache", "past_key_values")

_KNOWN = frozenset(TransformersKwargs.__annotations__)
_LOSS = frozenset({"num_items_in_batch", "shift_labels", "ignore_index"})


def takes_cache(forward: Callable) -> Callable:
    """Lets a `forward` that is written with `cache` be called by either name of it.

    Its signature shows the one that the installed release uses, in the same place.
    """
    signature = inspect.signature(forward)
    shown = [
        p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()
    ]

    @functools.wraps(forward)
    def either(self, *args, **kwargs):
        given = [kwargs.pop(name) for name in _NAMES if kwargs.get(name) is not None]
        if len(given) == 2:
            raise TypeError(f"{type(self).__name__}: give cache or past_key_values, not both")
        kwargs.pop("past_key_values", None)
        if given:
            kwargs["cache"] = given[0]
        return forward(self, *args, **kwargs)

    either.__signature__ = signature.replace(parameters=shown)
    return either


def check_arguments(model: object, arguments: dict[str, Any]) -> None:
    """TypeError for an argument that neither the library nor the model knows, unless it is None.

    A forward has to take `**kwargs` for what attention and losses may be given; one that is not
    among these would change nothing, and nobody would know.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        if name == "output_router_logits" and value:
            raise TypeError(
                f"{type(model).__name__}: output_router_logits is not served, as the routers keep "
                "no logits; output.routings has each layer's ids, weights, load and importance"
            )
        if name not in _KNOWN and name not in _LOSS:
            raise TypeError(f"{type(model).__name__}: unexpected keyword argument {name!r}")
