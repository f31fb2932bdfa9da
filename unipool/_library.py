# SPDX-License-Identifier: Apache-2.0
"""Loads the op libraries, which register the ops with torch.

The libraries hold no Python: one build serves every Python of the torch version it was made for.
UNIPOOL_LIBRARY_DIR names another folder than the package's own to take them from.
"""

import os
from pathlib import Path

import torch

LIBRARY_DIR = Path(os.environ.get("UNIPOOL_LIBRARY_DIR", Path(__file__).parent / "lib"))
REBUILD = "rebuild with: pip install --no-build-isolation --no-deps --force-reinstall ."
CPU, CUDA = "libunipool_cpu.so", "libunipool_cuda.so"

_SOURCE = Path(__file__).parents[1]

loaded: list[Path] = []


def _load(name: str) -> None:
    path = LIBRARY_DIR / name
    if not path.exists():
        own = Path(__file__).parent / "lib" == LIBRARY_DIR
        if own and (_SOURCE / "CMakeLists.txt").exists():
            # Python looks in the folder that it is started in before it looks at what is installed.
            raise ImportError(
                f"unipool: {_SOURCE} is a source folder whose ops were not built, and it hides an "
                "installed unipool: run Python from another folder, or build here with: pip "
                "install --no-build-isolation -e ."
            )
        raise ImportError(f"unipool: {path} is missing, the ops were not built; {REBUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ImportError(
            f"unipool: {path.name} does not fit torch {torch.__version__} ({reason}); {REBUILD}"
        ) from None
    loaded.append(path)


_load(CPU)
# Built only with a CUDA torch; a CPU torch beside it (no libtorch_cuda) just has the CPU ops.
if torch.version.cuda is not None and (LIBRARY_DIR / CUDA).exists():
    _load(CUDA)
