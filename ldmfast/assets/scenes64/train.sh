#!/usr/bin/env bash
# How the model in this folder was trained: about an hour and a half on one core of a Zen 3 (AVX2). RUN: where to work.
set -euo pipefail
RUN=${1:?usage: train.sh RUN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ldmfast data scenes "$RUN/scenes" --count 8000
ldmfast train scenes --data "$RUN/scenes" --autoencoder scenes64 --output "$RUN/denoiser" --recipe scenes64
ldmfast evaluate --model "$RUN/denoiser/pipeline" --data "$RUN/scenes" --output "$RUN/metrics.json"
