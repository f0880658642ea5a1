"""What a training run is made of. Where a shipped model's recipe differs, ldmfast/recipes says so.

Every field is also an option of `ldmfast train ...` (`save_every` is `--save-every`) and a key of a recipe.
"""

from dataclasses import dataclass, field, fields

PERCEPTUAL = ("none", "auto", "lpips-vgg", "squeezenet1.1", "efficientnet-lite0", "ms-ssim")
FEATURES = ("none", "squeezenet1.1", "efficientnet-lite0")
NORMS = ("batch", "spectral")
CONDITIONS = ("text", "transformer", "class", "inpainting", "super-resolution", "none")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """How either stage is optimised."""

    batch: int = option(16, "pictures a step, on each process and in each of `accumulate` parts")
    accumulate: int = option(1, "parts that a step's batch is computed in; their gradients are averaged")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay")
    schedule: str = option("cosine", "learning-rate schedule", SCHEDULES)
    warmup: int = option(100, "steps of linear warm-up")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the averaged weights, which are what is saved")
    seed: int = option(0, "seeds weights, batches and noise")
    precision: str = option("bf16", "arithmetic of the forward pass; weights stay float32", ("bf16", "fp16", "fp32"))
    device: str = option("auto", "where to train; auto is CUDA where there is a GPU", ("auto", "cpu", "cuda"))
    export: str = option("fp16", "precision of the exported weights", ("fp16", "fp32"))
    save_every: int = option(200, "steps between checkpoints")
    log_every: int = option(20, "steps over which the reported loss is averaged")
    tensorboard: bool = option(False, "write scalars and sample grids to OUTPUT/tensorboard")
    sample_every: int = option(0, "steps between sample grids, in OUTPUT/samples; 0 draws none")

    def __post_init__(self):
        positive = ("batch", "accumulate", "learning_rate", "clip", "save_every", "log_every", "steps")
        positive += ("size", "rank", "width", "text_layers", "map_channels")
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name}={value!r} is none of {', '.join(map(str, choices))}")
            if f.name in positive and not value > 0:
                raise ValueError(f"{f.name}={value} must be above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be at least 0 and below 1")
        for name in ("warmup", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class PictureLossConfig(RunConfig):
    """What decoded pictures are compared by; see training/objective.py."""

    batch: int = option(8, "pictures a step")
    ssim_weight: float = option(0.2, "weight of 1 - SSIM")
    perceptual: str = option("none", "perceptual distance in the loss; auto is the best that is installed", PERCEPTUAL)
    perceptual_weight: float = option(1.0, "weight of the perceptual distance")
    lpips: str = option("", "weights of LPIPS-VGG: VGG16's file and the heads' file, with a comma between them")
    logvar: str = option("fixed", "learned: divide the reconstruction by exp(logvar), and add it", ("fixed", "learned"))
    adversarial: float = option(0.0, "weight of the patch discriminator's term, before the adaptive one; 0: none")
    adversarial_start: int = option(0, "first step whose loss has the discriminator's term")
    discriminator_lead: int = option(0, "steps before that in which the discriminator already learns")
    discriminator_channels: int = option(64, "channels after the discriminator's first convolution")
    discriminator_layers: int = option(3, "its convolutions of stride 2; of features, the maps that it sees")
    discriminator_features: str = option("none", "network whose features it sees; none: it sees pixels", FEATURES)
    discriminator_norm: str = option("batch", "normalisation in the discriminator", NORMS)
    discriminator_rate: float = option(0.0, "peak learning rate of the discriminator; 0: as what it judges")

    def __post_init__(self):
        super().__post_init__()
        if self.lpips and self.perceptual not in ("auto", "lpips-vgg"):
            raise ValueError(f"lpips={self.lpips} is not read by perceptual={self.perceptual}; make that lpips-vgg")
        for name in ("discriminator_channels", "discriminator_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "adversarial",
            "adversarial_start",
            "perceptual_weight",
            "discriminator_rate",
            "discriminator_lead",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class AutoencoderConfig(PictureLossConfig):
    """Stage 1: pictures to latents and back. By default L1 + SSIM + KL; see training/objective.py for the rest."""

    steps: int = option(1300, "training steps")
    size: int = option(64, "pictures are trained at this many pixels a side")
    crop: int = option(0, "train on random crops of this many pixels a side; 0: on whole pictures")
    channels: tuple = option((32, 64, 96), "channels at each resolution; one halving fewer than there are entries")
    layers: int = option(1, "residual blocks at each resolution")
    start: str = option("torch", "first weights: torch's, or of unit gain with biases of 0", ("torch", "unit"))
    groups: int = option(8, "groups of GroupNorm; with a channel a group the ground's colour is lost")
    latent_channels: int = option(4, "channels of the latent")
    family: str = option("kl", "regulariser of the latent: a KL term, or a codebook (vq)", ("kl", "vq"))
    codebook: int = option(1024, "vq: codes in the codebook")
    codebook_weight: float = option(1.0, "vq: weight of the codebook and commitment terms")
    commitment: float = option(0.25, "vq: weight of the commitment within them")
    codebook_start: int = option(0, "vq: steps without quantising before the codebook is seeded from encodings")
    revive_every: int = option(50, "vq: steps after which a code that was never chosen is re-seeded; 0 never does")
    kl_weight: float = option(3e-4, "weight of the KL term (mean over latent elements)")

    def __post_init__(self):
        super().__post_init__()
        f = 2 ** max(len(self.channels) - 1, 0)
        for name in ("size", "crop"):
            if not self.channels or getattr(self, name) % f:
                got = f"{name}={getattr(self, name)}"
                raise ValueError(f"{got} is not divisible by f={f}, which channels={self.channels} amounts to")
        if not 0 <= self.crop <= self.size:
            raise ValueError(f"crop={self.crop} must lie between 0 and size={self.size}")
        if self.codebook < 1:
            raise ValueError(f"codebook={self.codebook} must be at least 1")
        for name in ("codebook_start", "revive_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class DecoderConfig(PictureLossConfig):
    """Stage 1b: the decoder alone goes on learning; the latents stay as they are."""

    steps: int = option(450, "training steps")
    latent_noise: float = option(0.05, "deviation of the noise added to latents, for a denoiser is never exact")


@dataclass(frozen=True)
class LatentsConfig(RunConfig):
    """What every denoiser of cached latents has, whatever it is told."""

    batch: int = option(32, "latents a step")
    steps: int = option(3000, "training steps")
    schedule: str = option("constant_with_warmup", "learning-rate schedule; averaging the weights anneals", SCHEDULES)
    learning_rate: float = option(8e-4, "peak learning rate of AdamW")
    channels: tuple = option((64, 96, 128), "channels at each resolution")
    layers: int = option(1, "residual blocks at each resolution")
    groups: int = option(32, "groups of GroupNorm")
    attention: tuple = option((0, 1, 1), "1 where a resolution has attention")
    head_width: int = option(32, "channels of an attention head")
    time_embedding: str = option(
        "default", "the time is added to features (default), or scales and shifts them", ("default", "scale_shift")
    )
    prediction: str = option("epsilon", "what the network predicts", ("epsilon", "v_prediction", "sample"))
    beta_start: float = option(0.0015, "first beta of the scaled-linear schedule")
    beta_end: float = option(0.0195, "last beta of the scaled-linear schedule")
    min_snr: float = option(5.0, "min-SNR-gamma loss weighting; 0 turns it off")
    guidance_dropout: float = option(0.1, "share of captions replaced by the empty one")
    plain_captions: float = option(0.5, "share of a picture's draws that use its first caption")
    latents: str = option("", "a file that keeps the encoded pictures; made if it is not there, checked if it is")
    latent_scale: str = option(
        "config", "scale latents by the first stage's factor, or by 1 / their measured deviation", ("config", "std")
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")

    def __post_init__(self):
        super().__post_init__()
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention={self.attention} needs one entry for each of channels={self.channels}")
        for share in ("guidance_dropout", "plain_captions"):
            if not 0 <= getattr(self, share) <= 1:
                raise ValueError(f"{share}={getattr(self, share)} must lie between 0 and 1")
        if not self.min_snr >= 0:
            raise ValueError(f"min_snr={self.min_snr} must not be negative")


@dataclass(frozen=True)
class DenoiserConfig(LatentsConfig):
    """Stage 2: a denoiser of cached latents, told a caption, a class, a picture or nothing."""

    condition: str = option(
        "text", "what the denoiser is told; text has a frozen encoder, transformer one trained with it", CONDITIONS
    )
    text_encoder: str = option("minilm", "text: 'minilm', a hub name or a folder")
    class_key: str = option("object", "class: the key of metadata.jsonl that holds it")
    pooled_text: bool = option(False, "text, transformer: tell the caption beside the timestep, too, as one vector")
    width: int = option(128, "class, transformer: channels of the tokens")
    text_layers: int = option(2, "transformer: how many layers")


@dataclass(frozen=True)
class ScenesConfig(LatentsConfig):
    """Stage 2 on composed scenes: a denoiser that is told boxes, among them a class's, or a semantic map."""

    channels: tuple = option((32, 64, 96), "channels at each resolution")
    groups: int = option(16, "groups of GroupNorm")
    prediction: str = option("v_prediction", "what the network predicts", ("epsilon", "v_prediction", "sample"))
    min_snr: float = option(0.0, "min-SNR-gamma loss weighting; 0 turns it off")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    guidance_dropout: float = option(0.1, "share of what is told replaced by nothing")
    plain_captions: float = option(0.5, "share of draws that tell boxes; the others tell boxes or the map")
    width: int = option(128, "channels of the boxes' tokens")
    map_channels: int = option(8, "channels that a semantic map is brought to, and boxes are filled with")


@dataclass(frozen=True)
class LoraConfig(RunConfig):
    """LoRA: low-rank layers beside a finished denoiser's attention learn a new collection."""

    batch: int = option(8, "latents a step, on each process and in each of `accumulate` parts")
    steps: int = option(500, "training steps")
    schedule: str = option("constant_with_warmup", "learning-rate schedule", SCHEDULES)
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    ema: float = option(0.99, "decay of the averaged weights, which are what is saved")
    rank: int = option(8, "rank of each layer's update")
    alpha: float = option(0.0, "the update is scaled by alpha / rank; 0 means the rank itself, a scale of 1")
    targets: str = option("to_q,to_k,to_v,to_out.0", "ends of the names of the layers that get one")
    min_snr: float = option(0.0, "min-SNR-gamma loss weighting; 0 turns it off")
    guidance_dropout: float = option(0.1, "share of captions replaced by the empty one")
    plain_captions: float = option(0.5, "share of a picture's draws that use its first caption")
    latents: str = option("", "a file that keeps the encoded pictures; made if it is not there, checked if it is")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")


# the sections of a recipe, which are the stages of `ldmfast train`
STAGES = {
    "autoencoder": AutoencoderConfig,
    "decoder": DecoderConfig,
    "denoiser": DenoiserConfig,
    "scenes": ScenesConfig,
    "lora": LoraConfig,
}
