#!/usr/bin/env bash
# Everything that needs a GPU, in one go, without a network and in under 10 minutes:
#   bench/gpu.sh [OUT]        OUT: where logs and JSON go (default: gpu-results)
# Build; doctor; every op's numbers and contract on every backend; compute-sanitizer on small shapes; the op table with
# the percentages of the copy and matrix-product rates measured in the same run; the SD1.5 step at 512x512 with guidance
# for ours, stock eager and torch.compile max-autotune. Speed is not reported on red tests, unless LDMFAST_BENCH_RED=1.
# Needs: NVIDIA GPU and driver, nvcc, and PYTHON (default python3) with torch for CUDA, triton, diffusers, transformers,
# pytest, pytest-benchmark, pybind11, cmake, ninja.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-${OUT:-gpu-results}}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
exec > >(tee "$OUT/log.txt") 2>&1
started=$SECONDS
red=""

stage() { printf '\n== %s (at %d s)\n' "$1" $((SECONDS - started)); }

stage "build"
MAX_JOBS=${MAX_JOBS:-$(nproc)} $PYTHON setup.py -q build_ext --inplace || exit 1

stage "doctor"
timeout 60 $PYTHON -m ldmfast doctor || red="doctor"
$PYTHON bench/resources.py --arch 90 --json "$OUT/resources.json" || red="$red resources"

stage "numbers and contract, every backend"
timeout 150 $PYTHON -m pytest -q --maxfail=20 tests/ops/test_ops_numbers.py -k "(cuda and not host) or triton" \
  || red="$red numbers"
timeout 150 $PYTHON -m pytest -q --maxfail=20 tests/ops/test_backward.py -k "(cuda and not host) or triton" \
  || red="$red gradients"
timeout 90 $PYTHON -m pytest -q tests/ops/test_ops_contract.py || red="$red contract"

stage "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 75 compute-sanitizer --tool $tool --error-exitcode 9 --kernel-regex kns=ldmfast \
      $PYTHON bench/sanitize.py || red="$red $tool"
  done
else
  echo "compute-sanitizer is not on PATH"; red="$red sanitizer"
fi

if [ -n "$red" ] && [ "${LDMFAST_BENCH_RED:-0}" != 1 ]; then
  echo "red: $red. No speed is measured; set LDMFAST_BENCH_RED=1 to measure all the same."
  exit 1
fi

stage "ops"
timeout 150 $PYTHON -m pytest -q bench/bench_ops.py --benchmark-only --benchmark-json="$OUT/ops.json" || red="$red ops"

stage "SD1.5 step"
timeout 240 $PYTHON bench/step_time.py --json "$OUT/step.json" || red="$red step"

stage "done${red:+, red: $red}"
[ -z "$red" ]
