"""What a training run is made of. Where a shipped model's recipe differs, ldmfast/recipes says so.

Every field is also an option of `ldmfast train ...` (`save_every` is `--save-every`) and a key of a recipe.
"""

from dataclasses import dataclass

from ldmfast.training.options import again, check, option

PERCEPTUAL = ("none", "auto", "lpips-vgg", "squeezenet1.1", "efficientnet-lite0", "ms-ssim")
FEATURES = ("none", "squeezenet1.1", "efficientnet-lite0")
NORMS = ("batch", "spectral")
CONDITIONS = ("text", "transformer", "class", "inpainting", "super-resolution", "none")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def _at_a_constant_rate(config):
    return config.schedule.startswith("constant")


@dataclass(frozen=True)
class RunConfig:
    """How every stage is optimised."""

    steps: int = option(1000, "training steps", above=0, free=_at_a_constant_rate)
    # of these two the product with the number of processes may not differ: Run.restore compares it
    batch: int = option(16, "pictures a step, on each process and in each of `accumulate` parts", above=0, free=True)
    accumulate: int = option(
        1, "parts that a step's batch is computed in; their gradients are averaged", above=0, free=True
    )
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay", least=0)
    schedule: str = option("cosine", "learning-rate schedule", SCHEDULES)
    warmup: int = option(100, "steps of linear warm-up", least=0)
    clip: float = option(1.0, "largest gradient norm", above=0)
    ema: float = option(0.999, "decay of the averaged weights, which are what is saved", least=0, below=1)
    seed: int = option(0, "seeds weights, batches and noise", least=-(2**63), most=2**63 - 1)
    precision: str = option(
        "auto",
        "arithmetic of the forward pass; weights stay float32. auto: bf16 where the processor or GPU multiplies it, "
        "else fp32",
        ("auto", "bf16", "fp16", "fp32"),
        free=True,
    )
    device: str = option(
        "auto", "where to train; auto is CUDA where there is a GPU", ("auto", "cpu", "cuda"), free=True
    )
    export: str = option("fp16", "precision of the exported weights", ("fp16", "fp32"), free=True)
    skip_broken: bool = option(False, "leave out pictures and lines of metadata that cannot be read", free=True)
    save_every: int = option(200, "steps between checkpoints", above=0, free=True)
    log_every: int = option(20, "steps over which the reported loss is averaged", above=0, free=True)
    tensorboard: bool = option(False, "write scalars and sample grids to OUTPUT/tensorboard", free=True)
    sample_every: int = option(0, "steps between sample grids, in OUTPUT/samples; 0 draws none", least=0, free=True)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class PictureLossConfig(RunConfig):
    """What decoded pictures are compared by; see training/losses/autoencoder_loss.py."""

    batch: int = again(RunConfig, "batch", 8, "pictures a step")
    ssim_weight: float = option(0.2, "weight of 1 - SSIM", least=0)
    gradient_weight: float = option(0.0, "weight of the distance of edges' strengths, for crisp ones", least=0)
    perceptual: str = option("none", "perceptual distance in the loss; auto is the best that is installed", PERCEPTUAL)
    perceptual_weight: float = option(1.0, "weight of the perceptual distance", least=0)
    lpips: str = option("", "weights of LPIPS-VGG: VGG16's file and the heads' file, with a comma between them")
    logvar: str = option("fixed", "learned: divide the reconstruction by exp(logvar), and add it", ("fixed", "learned"))
    adversarial: float = option(
        0.0, "weight of the patch discriminator's term, before the adaptive one; 0: none", least=0
    )
    adversarial_start: int = option(0, "first step whose loss has the discriminator's term", least=0)
    discriminator_lead: int = option(0, "steps before that in which the discriminator already learns", least=0)
    discriminator_channels: int = option(64, "channels after the discriminator's first convolution", least=1)
    discriminator_layers: int = option(3, "its convolutions of stride 2; of features, the maps that it sees", least=1)
    discriminator_features: str = option("none", "network whose features it sees; none: it sees pixels", FEATURES)
    discriminator_norm: str = option("batch", "normalisation in the discriminator", NORMS)
    discriminator_rate: float = option(0.0, "peak learning rate of the discriminator; 0: as what it judges", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.lpips and self.perceptual not in ("auto", "lpips-vgg"):
            raise ValueError(f"lpips={self.lpips} is not read by perceptual={self.perceptual}; make that lpips-vgg")


@dataclass(frozen=True)
class AutoencoderConfig(PictureLossConfig):
    """Stage 1: pictures to latents and back. By default L1 + SSIM + KL; see training/losses/autoencoder_loss.py."""

    steps: int = again(RunConfig, "steps", 1300)
    size: int = option(64, "pictures are trained at this many pixels a side", above=0)
    crop: int = option(0, "train on random crops of this many pixels a side; 0: on whole pictures", least=0)
    channels: tuple = option(
        (32, 64, 96), "channels at each resolution; one halving fewer than there are entries", least=1
    )
    layers: int = option(1, "residual blocks at each resolution", least=0)
    start: str = option(
        "torch",
        "first weights: torch's; of unit gain with biases of 0; kl: those of a linear autoencoder of the pictures; "
        "kl: grown from the one that first_weights names, of half the size and with the same latents",
        ("torch", "unit", "linear", "grown"),
    )
    first_weights: str = option("", "start=grown: an autoencoder's folder, a pipeline's, or a shipped model's name")
    groups: int = option(8, "groups of GroupNorm; with a channel a group the ground's colour is lost", least=1)
    latent_channels: int = option(4, "channels of the latent", least=1)
    family: str = option("kl", "regulariser of the latent: a KL term, or a codebook (vq)", ("kl", "vq"))
    codebook: int = option(1024, "vq: codes in the codebook", least=1)
    codebook_weight: float = option(1.0, "vq: weight of the codebook and commitment terms", least=0)
    commitment: float = option(0.25, "vq: weight of the commitment within them", least=0)
    codebook_start: int = option(
        0, "vq: steps without quantising before the codebook is seeded from encodings", least=0
    )
    revive_every: int = option(
        50, "vq: steps after which a code that was never chosen is re-seeded; 0 never does", least=0
    )
    kl_weight: float = option(3e-4, "weight of the KL term (mean over latent elements)", least=0)
    keep_latents: float = option(
        0.0, "start=grown: weight of the latents' mean squared distance from those of first_weights' model", least=0
    )

    def __post_init__(self):
        super().__post_init__()
        f = 2 ** max(len(self.channels) - 1, 0)
        for name in ("size", "crop"):
            if not self.channels or getattr(self, name) % f:
                got = f"{name}={getattr(self, name)}"
                raise ValueError(f"{got} is not divisible by f={f}, which channels={self.channels} amounts to")
        if self.start in ("linear", "grown") and self.family != "kl":
            raise ValueError(f"start={self.start} is for family=kl; this one is family={self.family}")
        if (self.start == "grown") != bool(self.first_weights):
            raise ValueError(f"start=grown and first_weights go together, got {self.start} and {self.first_weights!r}")
        if self.keep_latents and self.start != "grown":
            raise ValueError(f"keep_latents={self.keep_latents} is for start=grown, got start={self.start}")
        if self.crop > self.size:
            raise ValueError(f"crop={self.crop} must be at most size={self.size}")


@dataclass(frozen=True)
class DecoderConfig(PictureLossConfig):
    """Stage 1b: the decoder alone goes on learning; the latents stay as they are."""

    steps: int = again(RunConfig, "steps", 450)
    latent_noise: float = option(
        0.05, "deviation of the noise added to latents, for a denoiser is never exact", least=0
    )
    denoiser: str = option("", "a pipeline's folder or a shipped model: latents are noised, and denoised by it")
    denoised_share: float = option(0.5, "denoiser: share of the steps whose latents are", least=0, most=1)
    denoised_most: float = option(
        0.45, "denoiser: how far into the schedule the noise is taken from, at most", above=0, below=1
    )


@dataclass(frozen=True)
class LatentsConfig(RunConfig):
    """What every denoiser of cached latents has, whatever its condition."""

    batch: int = again(RunConfig, "batch", 32, "latents a step, on each process and in each of `accumulate` parts")
    steps: int = again(RunConfig, "steps", 3000)
    schedule: str = again(
        RunConfig, "schedule", "constant_with_warmup", "learning-rate schedule; averaging the weights anneals"
    )
    learning_rate: float = again(RunConfig, "learning_rate", 8e-4)
    min_snr: float = option(5.0, "min-SNR-gamma loss weighting; 0 turns it off", least=0)
    guidance_dropout: float = option(0.1, "share of captions replaced by the empty one", least=0, most=1)
    latents: str = option(
        "", "a file that keeps the encoded pictures; made if it is not there, checked if it is", free=True
    )
    states: str = option(
        "", "a file that keeps what a frozen encoder makes of the captions; likewise made and checked", free=True
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", free=True
    )


@dataclass(frozen=True)
class FreshDenoiserConfig(LatentsConfig):
    """A denoiser that is trained from the beginning."""

    channels: tuple = option((64, 96, 128), "channels at each resolution", least=1)
    layers: int = option(1, "residual blocks at each resolution", least=0)
    groups: int = option(32, "groups of GroupNorm", least=1)
    attention: tuple = option((0, 1, 1), "1 where a resolution has attention", least=0, most=1)
    head_width: int = option(32, "channels of an attention head", least=1)
    time_embedding: str = option(
        "default", "the time is added to features (default), or scales and shifts them", ("default", "scale_shift")
    )
    first_weights: str = option(
        "", "a pipeline's folder or a shipped model whose U-Net's weights are begun with, where name and shape agree"
    )
    prediction: str = option("epsilon", "what the network predicts", ("epsilon", "v_prediction", "sample"))
    beta_start: float = option(0.0015, "first beta of the scaled-linear schedule", above=0, below=1)
    beta_end: float = option(0.0195, "last beta of the scaled-linear schedule", above=0, below=1)
    latent_scale: str = option(
        "config", "scale latents by the autoencoder's factor, or by 1 / their measured deviation", ("config", "std")
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention={self.attention} needs one entry for each of channels={self.channels}")
        if self.layers == 0 and len(set(self.channels)) > 1:
            raise ValueError(f"layers=0 cannot change the width, as channels={self.channels} asks")


@dataclass(frozen=True)
class DenoiserConfig(FreshDenoiserConfig):
    """Stage 2: a denoiser of cached latents, conditioned on a caption, a class, a picture or nothing."""

    plain_captions: float = option(0.5, "share of a picture's draws that use its first caption", least=0, most=1)
    condition: str = option(
        "text",
        "what the denoiser is conditioned on; text has a frozen encoder, transformer one trained with it",
        CONDITIONS,
    )
    text_encoder: str = option("minilm", "text: 'minilm', a hub name or a folder")
    class_key: str = option("object", "class: the key of metadata.jsonl that holds it")
    pooled_text: bool = option(
        False, "text, transformer: add the caption, pooled into one vector, to the timestep's embedding, too"
    )
    width: int = option(128, "class, transformer: channels of the tokens", above=0)
    text_layers: int = option(2, "transformer: how many layers", above=0)

    @property
    def first_input_share(self):
        """Share of a picture's draws that are conditioned on the first of its inputs; the others on any of them."""
        return self.plain_captions


@dataclass(frozen=True)
class ScenesConfig(FreshDenoiserConfig):
    """Stage 2 on composed scenes: a denoiser conditioned on boxes, among them a class's, or on a semantic map."""

    channels: tuple = again(FreshDenoiserConfig, "channels", (32, 64, 96))
    groups: int = again(FreshDenoiserConfig, "groups", 16)
    prediction: str = again(FreshDenoiserConfig, "prediction", "v_prediction")
    min_snr: float = again(LatentsConfig, "min_snr", 0.0)
    learning_rate: float = again(RunConfig, "learning_rate", 1e-3)
    guidance_dropout: float = again(LatentsConfig, "guidance_dropout", 0.1, "share of conditions that are left out")
    only_boxes: float = option(
        0.5,
        "share of draws conditioned on boxes for certain; the others on boxes or the map, half each",
        least=0,
        most=1,
        formerly="plain_captions",
    )
    width: int = option(128, "channels of the boxes' tokens", above=0)
    map_channels: int = option(8, "channels that a semantic map is brought to, and boxes are filled with", above=0)

    @property
    def first_input_share(self):
        """See DenoiserConfig; a scene's first input is its boxes."""
        return self.only_boxes


@dataclass(frozen=True)
class LoraConfig(LatentsConfig):
    """LoRA: low-rank layers beside a finished denoiser's attention learn a new collection."""

    batch: int = again(LatentsConfig, "batch", 8)
    steps: int = again(RunConfig, "steps", 500)
    schedule: str = again(RunConfig, "schedule", "constant_with_warmup")
    learning_rate: float = again(RunConfig, "learning_rate", 1e-3)
    ema: float = again(RunConfig, "ema", 0.99)
    min_snr: float = again(LatentsConfig, "min_snr", 0.0)
    plain_captions: float = option(0.5, "share of a picture's draws that use its first caption", least=0, most=1)
    rank: int = option(8, "rank of each layer's update", above=0)
    alpha: float = option(0.0, "the update is scaled by alpha / rank; 0 means the rank itself, a scale of 1", least=0)
    targets: str = option("to_q,to_k,to_v,to_out.0", "ends of the names of the layers that get one")

    @property
    def first_input_share(self):
        """See DenoiserConfig."""
        return self.plain_captions


# the sections of a recipe, which are the stages of `ldmfast train`
STAGES = {
    "autoencoder": AutoencoderConfig,
    "decoder": DecoderConfig,
    "denoiser": DenoiserConfig,
    "scenes": ScenesConfig,
    "lora": LoraConfig,
}
