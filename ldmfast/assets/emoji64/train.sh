#!/usr/bin/env bash
# How the model in this folder was trained: about an hour on one core of a Zen 4 with AVX512-BF16. RUN: where to work.
set -euo pipefail
RUN=${1:?usage: train.sh RUN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ldmfast data emoji "$RUN/pictures"
ldmfast train autoencoder --data "$RUN/pictures" --output "$RUN/autoencoder" --steps 1300 --seed 0
ldmfast train decoder --data "$RUN/pictures" --autoencoder "$RUN/autoencoder" --output "$RUN/decoder" --steps 450 --seed 0
ldmfast train denoiser --data "$RUN/pictures" --autoencoder "$RUN/decoder" --output "$RUN/denoiser" --steps 3000 --seed 0 \
    --prediction v_prediction --min-snr 0 --learning-rate 1e-3
ldmfast evaluate --model "$RUN/denoiser/pipeline" --data "$RUN/pictures" --output "$RUN/metrics.json"
