# SPDX-License-Identifier: Apache-2.0
"""Plants faults in PTX, one at a time, and says what the ops do with them on the fake GPU.

python plant.py PTX_FOLDER COMMAND ...     # SOFTGPU is set for the command; COMMAND such as
                                           # run.py SOFTGPU_BACKEND=ptx ... python check_ops.py
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MMA = r"(mma\.sync\S+bf16\S+\s+\{[^}]*\},\s*\{)(%r\d+),\s*(%r\d+),"
# name: file, pattern, replacement, ops to run
FAULTS = {
    "none": ("grouped_mm", r"^$", "", ""),
    "mma: two registers of A swapped": ("grouped_mm", MMA, r"\1\3, \2,", "grouped_mm"),
    "ldmatrix without .trans": ("grouped_mm", r"\.x4\.trans", ".x4", "grouped_mm"),
    "ldmatrix 8 bytes off": (
        "grouped_mm",
        r"(ldmatrix\S+ \{[^}]*\}, )\[(%r\d+)\]",
        r"\1[\2+8]",
        "grouped_mm",
    ),
    "cp.async.wait_group one too many": (
        "grouped_mm",
        r"cp\.async\.wait_group (\d)",
        lambda m: f"cp.async.wait_group {int(m[1]) + 1}",
        "grouped_mm",
    ),
    "cp.async without its zero fill": (
        "grouped_mm",
        r"(cp\.async\S+ \[[^]]*\], \[[^]]*\], 16), %r\d+",
        r"\1",
        "grouped_mm",
    ),
    "no bar.sync (grouped_mm)": ("grouped_mm", r"bar\.sync\s+0;", "", "grouped_mm"),
    "row offsets cut to 12 bits": (
        "grouped_mm",
        r"mul\.lo\.s64 (\s*)(%rd\d+), (%rd\d+), (%rd\d+);",
        r"mul.lo.s64 \1\2, \3, \4; and.b64 \2, \2, 4095;",
        "grouped_mm",
    ),
    "no bar.warp.sync (dispatch)": ("dispatch", r"bar\.warp\.sync\s+-1;", "", "dispatch_plan"),
    "no bar.sync (dispatch)": ("dispatch", r"bar\.sync\s+0;", "", "dispatch_plan"),
    "match.any of half a warp": (
        "dispatch",
        r"(match\.any\.sync\.b32 \s*%r\d+, %r\d+), %r\d+",
        r"\1, 65535",
        "dispatch_plan",
    ),
    "atomic becomes load, add, store": (
        "dispatch",
        r"atom\.shared\.add\.u32 (\s*)(%r\d+), (\[%r\d+\]), (%r\d+);",
        r"ld.shared.u32 \2, \3; add.s32 \2, \2, \4; st.shared.u32 \3, \2;",
        "dispatch_plan",
    ),
    "redux max becomes min": ("router", r"redux\.sync\.max", "redux.sync.min", "norm_topk"),
    "shuffle within half a warp": (
        "router",
        r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+, %r\d+), %r\d+,",
        r"\1, 4127,",
        "softmax_topk",
    ),
    "setp.lt.s32 becomes le": ("router", r"setp\.lt\.s32", "setp.le.s32", "norm_topk"),
    "ex2 becomes rcp": ("router", r"ex2\.approx\.ftz\.f32", "rcp.rn.f32", "softmax_topk"),
}


def outcome(folder: Path, fault: str, command: list[str]) -> str:
    file, pattern, to, ops = FAULTS[fault]
    text = (folder / f"{file}.90a.ptx").read_text()
    changed, n = re.subn(pattern, to, text, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "mutant.ptx"
        path.write_text(changed)
        env = {**os.environ, "SOFTGPU": str(path)}
        run = subprocess.run(
            [*command, *ops.split()], env=env, capture_output=True, text=True, check=False
        )
    text = run.stdout + run.stderr
    reports = [m[1] for m in re.finditer(r"softgpu: .*?block \d+,\d+: (.*)", text)]
    wrong = [m[0] for m in re.finditer(r"FAIL \w+ torch\.\w+: error \S+", text)]
    says = (reports or wrong or [f"rc {run.returncode}"])[0]
    return f"{n} places: {len(wrong)} wrong, {len(reports)} reports: {says[:230]}"


if __name__ == "__main__":
    for name in FAULTS:
        print(f"{name}: {outcome(Path(sys.argv[1]), name, sys.argv[2:])}", flush=True)
