#!/usr/bin/env bash
# How the model in this folder was trained. RUN: where to work. The denoiser it begins with is emoji600's, about three
# hours on one core of a Zen 3; what follows takes about three on two cores of an AVX512-BF16 machine.
set -euo pipefail
RUN=${1:?usage: train.sh RUN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ldmfast data emoji "$RUN/all" --objects all --placements 2
ldmfast train denoiser --data "$RUN/all" --autoencoder scenes64 --output "$RUN/emoji600" --recipe emoji600
ldmfast data objects "$RUN/pictures"
ldmfast train autoencoder --data "$RUN/pictures" --output "$RUN/autoencoder" --recipe emoji320
ldmfast train denoiser --data "$RUN/pictures" --autoencoder "$RUN/autoencoder" --output "$RUN/denoiser" \
    --recipe emoji320 --first-weights "$RUN/emoji600/pipeline"
ldmfast train decoder --data "$RUN/pictures" --autoencoder "$RUN/autoencoder" --output "$RUN/decoder" \
    --recipe emoji320 --denoiser "$RUN/denoiser/pipeline"
ldmfast data objects "$RUN/pairs" --alone 0.3 --seed 7  # seven in ten have two objects, which are harder to learn
ldmfast train denoiser --data "$RUN/pairs" --autoencoder "$RUN/autoencoder" --output "$RUN/further" \
    --recipe emoji320 --first-weights "$RUN/denoiser/pipeline" --steps 12000 --learning-rate 7e-4 --plain-captions 0.15
rm -r "$RUN/further/pipeline/vae" && cp -r "$RUN/decoder/vae" "$RUN/further/pipeline/vae"
ldmfast evaluate --model "$RUN/further/pipeline" --guidance 4 --data "$RUN/pictures" --output "$RUN/metrics.json"
