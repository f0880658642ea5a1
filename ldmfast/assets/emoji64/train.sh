#!/usr/bin/env bash
# How the model in this folder was trained: about an hour on one core of a Zen 4 with AVX512-BF16. RUN: where to work.
set -euo pipefail
RUN=${1:?usage: train.sh RUN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ldmfast data emoji "$RUN/pictures"
ldmfast train autoencoder --data "$RUN/pictures" --output "$RUN/autoencoder" --recipe emoji64
ldmfast train decoder --data "$RUN/pictures" --autoencoder "$RUN/autoencoder" --output "$RUN/decoder" --recipe emoji64
ldmfast train denoiser --data "$RUN/pictures" --autoencoder "$RUN/decoder" --output "$RUN/denoiser" --recipe emoji64
ldmfast evaluate --model "$RUN/denoiser/pipeline" --data "$RUN/pictures" --output "$RUN/metrics.json"
