#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU, in one run of less than 9 minutes: see gpu_check.py. PYTHON
# names the Python to use, UNIPOOL_COMMIT the commit where there is no .git.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
exec "$PYTHON" "$root/bench/gpu_check.py" "$@"
