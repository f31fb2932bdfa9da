# SPDX-License-Identifier: Apache-2.0
"""Memory faults: every op, forward and backward, reads and writes nothing outside of its tensors,
at odd sizes and at those of the fast paths, and no fresh memory shows. torch's allocator hands each
tensor its own allocation, to the byte at a page that cannot be touched."""

from collections.abc import Iterator

import planted
import pytest
import softgpu_ops
import torch
from cases import Case
from planted import Planted
from softgpu_ops import DTYPES, Step, check_same
from specs import GROUPED_MM, ROUTER_LOGITS, SPECS

if softgpu_ops.softgpu:
    import softgpu

pytestmark = planted.needs_softgpu

# Widths that no vector divides; rows of 16 bytes in every dtype, and tiles that are not full; one
# element more than a tile; one token.
CASES = [
    Case("odd", 33, 5, 2, 31, 13, routing="dropped"),
    Case("vectors", 37, 3, 1, 40, 24, routing="zipf"),
    Case("tile_and_one", 130, 2, 1, 72, 136),
    Case("one_token", 1, 3, 2, 8, 8),
]


@pytest.fixture(autouse=True)
def _uncached() -> Iterator[None]:
    torch.cuda.empty_cache()
    softgpu.damaged()  # by tests of other files
    torch.cuda.caching_allocator_enable(False)
    yield
    torch.cuda.caching_allocator_enable(True)


@pytest.mark.parametrize("where", ["end", "begin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spec", "case"),
    [(spec, case) for spec in SPECS for case in CASES if case.top_k > 1 or not spec.skip],
    ids=str,
)
def test_ops_stay_inside_of_their_tensors(spec, case, dtype, where):
    due = Step(spec, case, dtype).run()
    step = Step(spec, case, dtype, placed=lambda: softgpu.placed(where))
    with softgpu.placed(where, alignment=16):  # results and workspaces may count on it
        results = step.run()
    if spec is ROUTER_LOGITS:  # a product of torch's, whose order of sums depends on addresses
        torch.testing.assert_close(results, due)
    else:
        check_same(results, due)
    for t in results:
        assert not t.isnan().any(), "fresh memory shows"
    del step, results
    assert softgpu.damaged() == 0


# --- what the test above relies on, by planted faults


@pytest.fixture(params=[1, 7, 64, 1000], ids=lambda n: f"{n}_elements")
def exact(request) -> torch.Tensor:
    """Its end is at a page that cannot be touched."""
    with softgpu.placed("end"):
        return torch.ones(request.param, dtype=torch.int32, device="cuda")


def launch(kernels: Planted, name: str, *args: object) -> str:
    return kernels.launch(name, *args, grid=(-(-args[-1] // 32), 1, 1))


@pytest.mark.parametrize("exact_is", ["read", "written"])
def test_one_element_too_many(kernels, exact, exact_is, capfd):
    n = exact.numel()
    larger = torch.ones(n + 1, dtype=torch.int32, device="cuda")
    source, to = (exact, larger) if exact_is == "read" else (larger, exact)
    assert launch(kernels, "copy", source, to, n) == "cudaSuccess"
    assert launch(kernels, "copy", source, to, n + 1) == "cudaErrorLaunchFailure"
    assert f"0 bytes past an allocation of {4 * n} bytes" in capfd.readouterr().err


def test_the_element_before_the_first(kernels, capfd):
    with softgpu.placed("begin"):
        source = torch.ones(50, dtype=torch.int32, device="cuda")
    to = torch.ones(50, dtype=torch.int32, device="cuda")
    before = planted.address(source.data_ptr() - 4)
    assert launch(kernels, "copy", before, to, 50) == "cudaErrorLaunchFailure"
    assert "4 bytes before an allocation of 200 bytes" in capfd.readouterr().err


def test_a_write_near_an_allocation_is_noticed(kernels, capfd):
    """In the slack that alignment leaves, where nothing faults."""
    to = torch.ones(50, dtype=torch.int32, device="cuda")
    assert softgpu.damaged() == 0
    past = planted.address(to.data_ptr() + 200)
    assert kernels.launch("fill", past, 1, 7) == "cudaSuccess"
    assert softgpu.damaged() == 1
    assert "0 bytes past an allocation of 200 bytes" in capfd.readouterr().err
    assert softgpu.damaged() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_that_is_not_written_is_nan(kernels, dtype):
    fresh = torch.empty(101, dtype=dtype, device="cuda")
    assert fresh.isnan().all()
    due = Step(GROUPED_MM, CASES[0], dtype).run()
    assert not any(t.isnan().any() for t in due)
