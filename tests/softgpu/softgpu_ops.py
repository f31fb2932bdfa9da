# SPDX-License-Identifier: Apache-2.0
"""Every op, forward and backward, in a form that can be run again, captured and watched."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from cases import Case
from specs import OpSpec, to_device, upstream
from torch import Tensor

from unipool import ops

try:
    import softgpu
except ImportError:
    softgpu = None  # the tests are skipped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Step:
    """An op of a case on a device: its inputs and upstream gradients are made once, in placed()."""

    def __init__(
        self,
        spec: OpSpec,
        case: Case,
        dtype: torch.dtype,
        device: str = "cuda",
        placed: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.spec = spec
        with placed():
            inputs = to_device(spec.inputs(case, dtype), torch.device(device))
        self.inputs = {
            n: t.requires_grad_() if n in spec.differentiable else t for n, t in inputs.items()
        }
        self.wrt = [self.inputs[n] for n in spec.differentiable]
        results = spec.call(ops, self.inputs)
        self.roots = [n for n, t in results.items() if t.requires_grad]
        with placed():
            self.upstream = [upstream(case, n, results[n]) for n in self.roots]

    def run(self) -> list[Tensor]:
        """Results, then the gradients of the inputs. Nothing here but the op waits or copies."""
        results = self.spec.call(ops, self.inputs)
        grads = ()
        if self.roots:
            grads = torch.autograd.grad([results[n] for n in self.roots], self.wrt, self.upstream)
        return [t.detach() for t in results.values()] + list(grads)


def check_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Equal to the bit."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x.cpu(), y.cpu()), f"result {i} differs"


WAITS = ("memcpy", "stream_synchronize", "device_synchronize", "event_synchronize")


@contextmanager
def quiet_calls() -> Iterator[list[dict[str, str]]]:
    """softgpu.calls(), and that none of them waits for the device or copies to the host."""
    with softgpu.calls() as calls:
        yield calls
    waits = [c for c in calls if c["call"] in WAITS or c.get("kind") == "d2h"]
    assert not waits
