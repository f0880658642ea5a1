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
# Crisp edges: how strong the gradients are counts more and more, in place of a discriminator; 6000 pictures will do.
mkdir "$RUN/few" && head -6000 "$RUN/pictures/metadata.jsonl" >"$RUN/few/metadata.jsonl"
(cd "$RUN/pictures" && ls | sed -n 1,6000p | xargs ln -t ../few)
crisp() { ldmfast train decoder --recipe emoji320 --data "$RUN/few" --adversarial 0 --warmup 20 "$@"; }
back=(--denoiser "$RUN/further/pipeline" --denoised-share 0.3 --ema 0.99 --schedule cosine)
crisp --autoencoder "$RUN/decoder" --output "$RUN/crisp1" --gradient-weight 1 --steps 300 --ema 0.98
crisp --autoencoder "$RUN/crisp1" --output "$RUN/crisp2" --gradient-weight 8 --steps 200 --ema 0.97
crisp --autoencoder "$RUN/crisp2" --output "$RUN/crisp3" --gradient-weight 16 --steps 700 --learning-rate 5e-4 "${back[@]}"
crisp --autoencoder "$RUN/crisp3" --output "$RUN/crisp4" --gradient-weight 40 --steps 800 --learning-rate 7e-4 "${back[@]}"
back=(--denoiser "$RUN/further/pipeline" --denoised-share 0.2 --ema 0.99 --schedule cosine)
crisp --autoencoder "$RUN/crisp4" --output "$RUN/crisp5" --gradient-weight 100 --steps 500 --learning-rate 6e-4 "${back[@]}"
crisp --autoencoder "$RUN/crisp5" --output "$RUN/crisp6" --gradient-weight 200 --steps 600 --learning-rate 7e-4 "${back[@]}"
rm -r "$RUN/further/pipeline/vae" && cp -r "$RUN/crisp6/vae" "$RUN/further/pipeline/vae"
ldmfast evaluate --model "$RUN/further/pipeline" --guidance 4 --data "$RUN/pictures" --output "$RUN/metrics.json"
