#!/usr/bin/env bash
# Everything that needs a GPU, without a network, in stages of under nine minutes each:
#   bench/gpu.sh OUT [A] [B] [C] [D]      OUT: where logs and JSON go; without a letter, every stage in turn
#   A  build, and the CUDA kernels' tests
#   B  a step (SD1.5, SDXL, the decoder, training) beside its rivals, its profile by class, every op, every layer
#   C  the Triton kernels' tests, the machine's own speeds, compute-sanitizer, Nsight Compute
#   D  torch.compile, which takes minutes to measure its kernels
# Nothing stops at a red test: figures are measured all the same, and their JSON says what was red. Each row is written
# when it is measured; a stage that was cut short goes on with --resume.
#   --carried FOLDER   modules and wheels that `python bench/gpu/carry.py FOLDER` made elsewhere; nothing is compiled
#   --dry              every stage on the CPU with tiny networks: what a first minute on a GPU would stumble over
# Needs: NVIDIA GPU and driver; PYTHON (default python3) with torch for CUDA, triton, diffusers, transformers, pytest,
# and to build, nvcc, pybind11, cmake, ninja. pytest-xdist is used where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu/run.py "$@"
