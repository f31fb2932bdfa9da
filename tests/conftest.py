# SPDX-License-Identifier: Apache-2.0
"""Backends and dtypes: a test that asks for `backend` (or `device`) runs once on each backend that
this machine has; one that asks for `dtype` too, once for each dtype of the backend. Ids read
`ragged-bf16-cpu`. `cuda` is a GPU or the software one (softgpu/README.md)."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import unipool  # noqa: F401  (loads the ops)

# An assertion in what tests share says its values as one in a test does.
SHARED = sorted(path.stem for path in (Path(__file__).parent / "support").glob("*.py"))
pytest.register_assert_rewrite(*SHARED)

import devices  # noqa: E402

DTYPE_NAMES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops, named after the device that its tensors are on."""

    name: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def raw(self) -> object:
        return torch.ops.unipool


BACKENDS = [Backend("cpu", (torch.float32, torch.float64, torch.bfloat16))]
if torch.cuda.is_available():
    BACKENDS.append(Backend("cuda", (torch.float32, torch.bfloat16, torch.float16)))


@pytest.hookimpl(trylast=True)  # after the marks, so that the backend ends the id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    once = metafunc.definition.get_closest_marker("any_device")
    backends = BACKENDS[:1] if once else BACKENDS
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("backend", backends, ids=lambda b: b.name, indirect=True)
        return
    metafunc.parametrize(
        ("dtype", "backend"),
        [(dtype, backend) for backend in backends for dtype in backend.dtypes],
        ids=[f"{DTYPE_NAMES[dtype]}-{b.name}" for b in backends for dtype in b.dtypes],
        indirect=["backend"],
    )


@pytest.fixture(autouse=True, scope="session")
def _share_cores() -> None:
    """The workers of pytest-xdist divide the cores among them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token files of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIPOOL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few files of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors, whose threads would mostly wait for each other. What threads may
    change is tested where they are set: test_properties.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_scale(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """One thread, also in processes that the test starts: for models too small for more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def backend(request: pytest.FixtureRequest, one_thread: None) -> Iterator[Backend]:
    with on_device(torch.device(request.param.name)):
        yield request.param


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return torch.device(backend.name)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Attention is the plain kind there: the fused ones of a GPU add up gradients in any order, and
    many tests ask two equal steps for equal bits."""
    devices.select(device)
    try:
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
            yield
    finally:
        devices.select(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Tests draw from their case's own generator; this covers what draws from the global one."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def outlives_its_group() -> list:
    """Holds what DistributedDataParallel returned until all tests are done. The destructor of its
    reducer may be the one that joins gloo's thread, which it does with Python's lock held; a thread
    that is just then dropping finished work waits for that lock, and both wait for ever."""
    return []


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory with NaN (floats) or the greatest value (integers), so that an element
    which an op leaves unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
