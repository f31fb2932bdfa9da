#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU, in one run of less than 9 minutes:
#
#   bench/gpu_check.sh OUT [--prebuilt DIR]
#
# Builds the ops (or, with --prebuilt, takes DIR/lib/libunipool_{cpu,cuda}.so and compiles nothing),
# runs the op tests on cuda, compares the backends, times the kernels, one layer, the pool step and
# Hugging Face models, and runs compute-sanitizer. JSON and logs go to OUT, summary.json says how each step ended. PYTHON names
# the Python to use, UNIPOOL_COMMIT the commit where there is no .git. Exit status: 0 if every step
# passed or could not run here for want of a tool, 1 if one failed, 2 for a wrong call or no GPU.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SUITES=(router dispatch experts contract nn pool_pass pooled_layers properties mutants memory)
TOTAL_SECONDS=${TOTAL_SECONDS:-530}
failed=0

die() {
  echo "gpu_check: $1" >&2
  exit 2
}

# --- steps

# record NAME STATUS SECONDS DETAIL: a line of steps.tsv; status: passed, failed or not run.
record() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4//$'\t'/ }" >>"$OUT/steps.tsv"
  if [[ $2 == failed ]]; then failed=1; fi
}

# step NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds and what is left of all, its
# output into NAME.log; the last line of that is the detail. EXPECT: what the log has to contain.
step() {
  local name=$1 limit=$2 log="$OUT/$1.log" begin=$SECONDS left=$((TOTAL_SECONDS - SECONDS)) code=0
  shift 2
  if ((left < 5)); then
    record "$name" failed 0 "not started: the ${TOTAL_SECONDS} s of the whole check are over"
    return 1
  fi
  if ((left < limit)); then limit=$left; fi
  echo "gpu_check: $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || code=$?
  local status=passed detail
  detail=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c -150)
  if ((code == 124 || code == 137)); then
    status=failed detail="stopped after $limit s; $detail"
  elif ((code != 0)); then
    status=failed detail="exit status $code; $detail"
  elif ! grep -q -- "${EXPECT:-}" "$log"; then
    status=failed detail="its log does not say '$EXPECT'; $detail"
  fi
  record "$name" "$status" "$((SECONDS - begin))" "$detail"
  [[ $status == passed ]]
}

# Into a folder of its own: what is installed in this environment stays as it is.
build_ops() {
  PACKAGE=$(mktemp -d) || return 1
  trap 'rm -rf "$PACKAGE"' EXIT
  UNIPOOL_CUDA=ON step build 270 "$PYTHON" -m pip install --quiet --disable-pip-version-check \
    --no-build-isolation --no-deps --target "$PACKAGE" "$ROOT" || return 1
  export UNIPOOL_LIBRARY_DIR="$PACKAGE/unipool/lib"
}

run_tests() {
  local files=() workers=() suite
  for suite in "${SUITES[@]}"; do
    if [[ $suite == properties ]] && ! "$PYTHON" -c 'import hypothesis' 2>/dev/null; then
      record tests-properties "not run" 0 "hypothesis is not installed"
      continue
    fi
    files+=("tests/test_$suite.py")
  done
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  step tests 150 "$PYTHON" -m pytest -q -k cuda -p no:cacheprovider "${workers[@]}" \
    --junitxml "$OUT/tests.xml" "${files[@]}"
}

sanitize() {
  local tool options
  if ! command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      record "$tool" "not run" 0 "compute-sanitizer is not installed (it comes with the toolkit)"
    done
    return
  fi
  # Each allocation on its own, so that a row past a tensor's end is past an allocation's end.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    options=(--tool "$tool" --error-exitcode 9)
    if [[ $tool == memcheck ]]; then
      options+=(--report-api-errors no) # PyTorch probes the driver with calls that may fail
    fi
    EXPECT='SUMMARY: 0' step "$tool" 60 compute-sanitizer "${options[@]}" "$PYTHON" \
      bench/gpu_smoke.py --few
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

# pool_step NAME TOKENS D_MODEL D_FF EXPERTS: the width and pool of a scale, four layers of it.
pool_step() {
  local peers=(grouped_mm "grouped_mm compiled")
  if "$PYTHON" -c 'import transformers' 2>/dev/null; then peers+=("transformers grouped_mm"); fi
  step "pool_step_$1" 60 "$PYTHON" bench/pool_step.py --device cuda --layers 4 --tokens "$2" \
    --d-model "$3" --d-ff "$4" --experts "$5" --dtype bfloat16 --peers "${peers[@]}" \
    --json "$OUT/pool_step_$1.json"
}

# Hugging Face models at their published widths, in bfloat16.
integration() {
  if ! "$PYTHON" -c 'import transformers' 2>/dev/null; then
    record integration "not run" 0 "transformers is not installed"
    return
  fi
  step integration 60 "$PYTHON" bench/bench_integration.py --device cuda --widths full --layers 2 \
    --tokens 8192 --dtype bfloat16 --json "$OUT/integration.json"
}

# --- summary

commit() {
  local id
  id=${UNIPOOL_COMMIT:-$(git -C "$ROOT" rev-parse HEAD 2>/dev/null)}
  if [[ -n $(git -C "$ROOT" status --porcelain --untracked-files=no 2>/dev/null) ]]; then
    id+=-dirty
  fi
  echo "${id:-unknown}"
}

# summary.json from steps.tsv, nvidia-smi, torch and git; prints the table.
write_summary() {
  "$PYTHON" - "$OUT" "$(commit)" "$SECONDS" <<'PYTHON'
import csv
import json
import subprocess
import sys
from pathlib import Path

out, commit, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.limit")


def nvidia_smi():
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        values = [value.strip() for value in text.splitlines()[0].split(",")]
        return dict(zip(FIELDS, values))
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}


try:
    import torch
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
except ImportError:
    versions = {"torch": None, "cuda": None}
gpu = nvidia_smi()
rows = csv.reader((out / "steps.tsv").read_text().splitlines(), "excel-tab", quoting=csv.QUOTE_NONE)
steps = [dict(name=n, status=s, seconds=int(t), detail=d) for n, s, t, d in rows]
summary = {
    "gpu": gpu.pop("name", "unknown"),
    "driver": gpu.pop("driver_version", "unknown"),
    **versions,
    "commit": commit,
    "clocks": gpu,
    "seconds": seconds,
    "passed": all(step["status"] != "failed" for step in steps),
    "steps": steps,
}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print(f"\n{summary['gpu']}, driver {summary['driver']}, torch {summary['torch']}, "
      f"commit {commit[:12]}, {seconds} s")
for step in steps:
    print(f"{step['name']:<18}{step['status']:<9}{step['seconds']:>4} s  {step['detail']}")
PYTHON
  rm -f "$OUT/steps.tsv"
}

# --- main

main() {
  local prebuilt="" out="" usage="usage: bench/gpu_check.sh OUT [--prebuilt DIR]"
  while (($#)); do
    case $1 in
      --prebuilt)
        if [[ -z ${2:-} ]]; then die "$usage"; fi
        prebuilt=$2
        shift 2
        ;;
      -*) die "$usage" ;;
      *)
        if [[ -n $out ]]; then die "$usage"; fi
        out=$1
        shift
        ;;
    esac
  done
  if [[ -z $out ]]; then die "$usage"; fi
  if [[ -e $out/summary.json ]]; then die "$out holds the results of another run"; fi
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
  fi
  if [[ -n $prebuilt ]]; then
    for library in libunipool_cpu.so libunipool_cuda.so; do
      if [[ ! -f $prebuilt/lib/$library ]]; then die "$prebuilt/lib/$library is missing"; fi
    done
    UNIPOOL_LIBRARY_DIR=$(cd "$prebuilt/lib" && pwd)
    export UNIPOOL_LIBRARY_DIR
  fi
  "$PYTHON" -c 'import torch' 2>/dev/null || die "$PYTHON cannot import torch: set PYTHON"
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    die "needs an NVIDIA GPU and a CUDA torch, found none"

  mkdir -p "$out" || die "cannot make the folder $out"
  OUT=$(cd "$out" && pwd)
  cd "$ROOT" || exit 2
  : >"$OUT/steps.tsv"
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

  if [[ -n $prebuilt ]] || build_ops; then
    local flags=()
    if [[ -n $prebuilt ]]; then flags=(--prebuilt); fi
    run_tests
    step compare_backends 90 "$PYTHON" bench/compare_backends.py "${flags[@]}" \
      --json "$OUT/compare_backends.json"
    step gpu_smoke 45 "$PYTHON" bench/gpu_smoke.py --profile --json "$OUT/kernels_ran.json"
    step bench_kernels 50 "$PYTHON" bench/bench_kernels.py --json "$OUT/bench_kernels.json"
    step bench_experts 80 "$PYTHON" bench/bench_experts.py --json "$OUT/bench_experts.json"
    pool_step 182m 32768 768 3072 96
    pool_step 830m 8192 1024 4096 384
    integration
    sanitize
  fi
  for log in bench_kernels bench_experts pool_step_182m pool_step_830m integration; do
    if [[ -f $OUT/$log.log ]]; then cat "$OUT/$log.log"; fi
  done
  write_summary || failed=1
  exit "$failed"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
