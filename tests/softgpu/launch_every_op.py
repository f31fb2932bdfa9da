# SPDX-License-Identifier: Apache-2.0
"""Runs every op, forward and backward, on the GPU of this process, against the CPU's reference;
a line for each that is wrong. test_runtime_profiles.py starts it once per GPU."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from cases import Case
from specs import SPECS, OpSpec, oracle, run, to_device
from tolerance import check_results

from unipool import ops

# From one row per expert to more than the widest tile holds; k = 1 and 2; widths that no tile
# divides.
CASES = [
    Case("few", 12, 8, 1, 40, 24),
    Case("some", 150, 4, 2, 72, 40, routing="zipf"),
    Case("many", 300, 2, 1, 64, 136, routing="one"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wrong(spec: OpSpec, case: Case, dtype: torch.dtype) -> str | None:
    inputs = spec.inputs(case, dtype)
    try:
        actual = run(spec, case, ops, to_device(inputs, torch.device("cuda")))
        check_results(spec, case, inputs, actual, oracle(spec, case, inputs), dtype)
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def main() -> int:
    torch.set_num_threads(1)
    failures = runs = 0
    for spec in SPECS:
        for case in CASES:
            if case.top_k == 1 and spec.skip:  # of renormalized scores: k = 1 has no gradient
                continue
            for dtype in DTYPES:
                runs += 1
                if why := wrong(spec, case, dtype):
                    failures += 1
                    print(f"{spec} {case} {dtype}: {why}")
    print(f"{torch.cuda.get_device_name()}: {runs} runs, {failures} wrong")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
