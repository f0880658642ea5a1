#!/usr/bin/env bash
# How the model in this folder was trained: about three hours on one core of a Zen 3 (AVX2). RUN: where to work.
set -euo pipefail
RUN=${1:?usage: train.sh RUN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ldmfast data emoji "$RUN/few"
ldmfast train autoencoder --data "$RUN/few" --output "$RUN/autoencoder" --recipe emoji64
ldmfast train decoder --data "$RUN/few" --autoencoder "$RUN/autoencoder" --output "$RUN/first" --recipe emoji64
ldmfast data emoji "$RUN/pictures" --objects all --placements 2
ldmfast train decoder --data "$RUN/pictures" --autoencoder "$RUN/first" --output "$RUN/decoder" --recipe emoji600
ldmfast train denoiser --data "$RUN/pictures" --autoencoder "$RUN/decoder" --output "$RUN/denoiser" --recipe emoji600
ldmfast evaluate --model "$RUN/denoiser/pipeline" --data "$RUN/pictures" --output "$RUN/metrics.json"
