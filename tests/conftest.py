# SPDX-License-Identifier: Apache-2.0
"""Backends and dtypes: a test that asks for `backend` (or `device`) runs once on each backend that
this machine has; one that asks for `dtype` too, once for each dtype of the backend. Ids read
`ragged-bf16-cpu`."""

import importlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import emulated
import pytest
import torch

from unipool.nn import pool_pass

OP_MODULES = [
    importlib.import_module(f"unipool.ops.{stem}")
    for stem in ("router", "router_logits", "dispatch", "grouped_mm", "expert_mlp")
]

DTYPE_NAMES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops: where its tensors live and the torch.ops namespace it is in."""

    name: str
    device: str
    namespace: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def raw(self) -> object:
        return getattr(torch.ops, self.namespace)


BACKENDS = [Backend("cpu", "cpu", "unipool", (torch.float32, torch.float64, torch.bfloat16))]
EMULATED = emulated.load()
if EMULATED:
    half = (torch.float32, torch.bfloat16, torch.float16)
    BACKENDS.append(Backend("emulated", "cpu", EMULATED, half))
if torch.cuda.is_available():
    half = (torch.float32, torch.bfloat16, torch.float16)
    BACKENDS.append(Backend("cuda", "cuda", "unipool", half))


@pytest.hookimpl(trylast=True)  # after the marks, so that the backend ends the id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, ids=lambda b: b.name, indirect=True)
        return
    metafunc.parametrize(
        ("dtype", "backend"),
        [(dtype, backend) for backend in BACKENDS for dtype in backend.dtypes],
        ids=[f"{DTYPE_NAMES[dtype]}-{b.name}" for b in BACKENDS for dtype in b.dtypes],
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
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Backend:
    chosen = request.param
    for module in (*OP_MODULES, pool_pass):
        monkeypatch.setattr(module, "_ops", chosen.raw)
    return chosen


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return torch.device(backend.device)


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
