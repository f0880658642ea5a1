"""Random small U-Nets, autoencoders (KL and VQ) and schedulers of diffusers, ours against stock.

A plan holds a configuration, the shapes of a call and a seed. A configuration that stock itself does not build or run
is no finding; ours has to be as far as 1e-5 from it in float32 (the contract `fast`), in shape and dtype equal. Where a
value is further, stock in float64 decides: it may be stock that is off.
"""

from __future__ import annotations

import copy

import diffusers
import torch
from hypothesis import strategies as st

FARTHEST = 1e-5  # of a whole network in float32, as norm of the difference over norm
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")


def few(*values):
    return st.sampled_from(values)


def _unet():
    return {
        "levels": few(1, 2, 3),
        "cross": st.integers(0, 7),  # a bit for each level with cross-attention
        "block_out_channels": st.lists(few(8, 16, 24), min_size=3, max_size=3),
        "layers_per_block": few(1, 2),
        "norm_num_groups": few(4, 8, 2),
        "cross_attention_dim": few(8, 12, 20),
        "attention_head_dim": few(4, 2, 8),
        "use_linear_projection": st.booleans(),
        "upcast_attention": st.booleans(),
        "only_cross_attention": st.booleans(),
        "transformer_layers_per_block": few(1, 2),
        "resnet_time_scale_shift": few("default", "scale_shift"),
        "act_fn": few("silu", "gelu", "mish"),
        "mid_block_type": few("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "mid_block_scale_factor": few(1, 2**0.5),
        "downsample_padding": few(1, 0),
        "flip_sin_to_cos": st.booleans(),
        "freq_shift": few(0, 1),
        "center_input_sample": st.booleans(),
        "class_embed_type": few(None, "timestep", "identity"),
        "num_class_embeds": few(None, 5),
        "class_embeddings_concat": st.booleans(),
        "time_embedding_type": few("positional", "fourier"),
        "time_embedding_act_fn": few(None, "silu"),
        "resnet_skip_time_act": st.booleans(),
        "resnet_out_scale_factor": few(1.0, 1.5),
        "conv_in_kernel": few(3, 1),
        "conv_out_kernel": few(3, 1),
        "dual_cross_attention": st.booleans(),
        "encoder_hid_dim": few(None, 10),
        "cross_attention_norm": few(None, "layer_norm"),
        "in_channels": few(4, 9, 1),
        "out_channels": few(4, 8),
        "norm_eps": few(1e-5, 1e-3),
    }


def _unet2d():
    shared = ("levels", "cross", "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim")
    more = ("resnet_time_scale_shift", "act_fn", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels")
    return {**{name: _unet()[name] for name in (*shared, *more)}, "add_attention": st.booleans()}


def _autoencoder():
    return {
        "levels": few(1, 2, 3),
        "block_out_channels": st.lists(few(8, 16, 24), min_size=3, max_size=3),
        "layers_per_block": few(1, 2),
        "norm_num_groups": few(4, 8, 2),
        "latent_channels": few(4, 1, 3),
        "act_fn": few("silu", "gelu"),
        "mid_block_add_attention": st.booleans(),
        "tiling": st.booleans(),
        "slicing": st.booleans(),
    }


def _vq():
    shared = ("levels", "layers_per_block", "norm_num_groups", "latent_channels", "act_fn", "mid_block_add_attention")
    return {
        **{name: _autoencoder()[name] for name in shared},
        "cross": st.integers(0, 7),  # a bit for each level with attention
        "block_out_channels": st.lists(few(8, 16, 24, 32), min_size=3, max_size=3),
        "in_channels": few(3, 1, 4),
        "out_channels": few(3, 1, 4),
        "num_vq_embeddings": few(5, 1, 64),
        "vq_embed_dim": few(None, 2, 8),
        "norm_type": few("group", "group", "spatial"),
    }


def _scheduler():
    return {
        "name": few(*SCHEDULERS),
        "num_train_timesteps": few(1000, 100, 37),
        "beta_schedule": few("linear", "scaled_linear", "squaredcos_cap_v2"),
        "beta_start": few(1e-4, 0.00085),
        "beta_end": few(0.012, 0.02),
        "prediction_type": few("epsilon", "v_prediction", "sample"),
        "timestep_spacing": few("leading", "trailing", "linspace"),
        "steps_offset": few(0, 1),
        "clip_sample": st.booleans(),
        "thresholding": st.booleans(),
        "rescale_betas_zero_snr": st.booleans(),
        "set_alpha_to_one": st.booleans(),
        "skip_prk_steps": st.booleans(),
        "variance_type": few("fixed_small", "fixed_large", "fixed_small_log"),
        "steps": few(1, 2, 5, 13),
        "eta": few(0.0, 0.5, 1.0),
    }


OPTIONS = {"unet": _unet, "unet2d": _unet2d, "autoencoder": _autoencoder, "vq": _vq, "scheduler": _scheduler}


def plans(network: str):
    """The strategy of plans for a kind of network, or "scheduler"."""
    call = {"N": few(1, 2, 3), "H": few(8, 16, 12, 7), "W": few(8, 16, 9), "tokens": few(1, 7, 77)}
    call |= {"timestep": few("int", "float", "0-d", "1-d"), "seed": st.integers(0, 999)}
    return st.fixed_dictionaries({"network": st.just(network), **call, **OPTIONS[network]()})


def _stock(plan):
    """The stock network of a plan. Raises what stock raises for a configuration that it does not take."""
    levels, kind = plan["levels"], plan["network"]
    config = {name: value for name, value in plan.items() if name in OPTIONS[kind]() and name not in _OURS}
    config["block_out_channels"] = tuple(plan["block_out_channels"][:levels])
    if kind == "autoencoder":
        down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
        return diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, sample_size=16, **config)
    attends = [bool(plan["cross"] >> i & 1) for i in range(levels)]
    attention = "CrossAttn{}Block2D" if kind == "unet" else "Attn{}Block2D"
    first, last = ("DownEncoder", "UpDecoder") if kind == "vq" else ("Down", "Up")
    down = tuple((attention if with_it else "{}Block2D").format(first) for with_it in attends)
    up = tuple((attention if with_it else "{}Block2D").format(last) for with_it in reversed(attends))
    named = {"down_block_types": down, "up_block_types": up, "sample_size": 16, **config}
    if kind == "vq":
        return diffusers.VQModel(**named)
    if kind == "unet2d":
        return diffusers.UNet2DModel(out_channels=3, **named)
    if plan["encoder_hid_dim"]:
        named["encoder_hid_dim_type"] = "text_proj"
    return diffusers.UNet2DConditionModel(**named)


_OURS = ("levels", "cross", "tiling", "slicing")


def _inputs(plan, model):
    """(arguments of the forward)"""
    N, kind = plan["N"], plan["network"]
    size = [plan[side] for side in "HW"]
    if kind == "autoencoder":
        return {"sample": torch.randn(N, 3, *(side * 2 for side in size))}
    if kind == "vq":
        pixels = [side << plan["levels"] - 1 for side in size]
        z = torch.randn(N, plan["vq_embed_dim"] or plan["latent_channels"], *size)
        return {"x": torch.randn(N, plan["in_channels"], *pixels), "z": z}
    timestep = {"int": 30, "float": 12.5, "0-d": torch.tensor(500), "1-d": torch.arange(N) * 97}[plan["timestep"]]
    found = {"sample": torch.randn(N, plan["in_channels"], *size), "timestep": timestep}
    if kind == "unet":
        width = plan["encoder_hid_dim"] or plan["cross_attention_dim"]
        found["encoder_hidden_states"] = torch.randn(N, plan["tokens"], width)
        if plan["class_embed_type"] == "identity":
            found["class_labels"] = torch.randn(N, model.time_embedding.linear_2.out_features)
        elif plan["class_embed_type"] or plan["num_class_embeds"]:
            found["class_labels"] = torch.arange(N) % 5
    return found


def _run_network(model, plan, given) -> tuple:
    """What is compared. A code is chosen by the nearest, so VQ's decoder gets latents that are the same for both."""
    if plan["network"] == "vq":
        quantized, unquantized = (model.decode(given["z"], without, return_dict=False) for without in (False, True))
        return *model.encode(given["x"], return_dict=False), *quantized, *unquantized
    if plan["network"] == "autoencoder":
        if plan["tiling"]:
            model.enable_tiling()
        if plan["slicing"]:
            model.enable_slicing()
        return model(**given, sample_posterior=False, return_dict=False)
    return model(**given, return_dict=False)


def _compare_network(plan):
    from ldmfast import AutoencoderKL, UNet, UNet2D, VQModel

    torch.manual_seed(plan["seed"])
    try:
        stock = _stock(plan).eval()
        for parameter in stock.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.0
        given = _inputs(plan, stock)
        with torch.no_grad():
            wanted = _run_network(stock, plan, copy.deepcopy(given))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return 0, []
    ours = {"unet": UNet, "unet2d": UNet2D, "autoencoder": AutoencoderKL, "vq": VQModel}[plan["network"]].adopt(stock)
    with torch.no_grad():
        got = _run_network(ours, plan, given)
    if not (found := _differences(got, wanted)):
        return 1, []
    exactly = {name: value.double() if _real(value) else value for name, value in given.items()}
    with torch.no_grad():
        exact = _run_network(stock.double(), plan, exactly)
    as_stock = [value.to(y.dtype) if _real(value) else value for value, y in zip(exact, wanted, strict=True)]
    return 1, found if _differences(got, as_stock) else []


def _real(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _differences(got, wanted) -> list[str]:
    return [sentence for pair in zip(got, wanted, strict=True) for sentence in _difference(*pair)]


def _difference(got, wanted, bound=FARTHEST) -> list[str]:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return [f"{got.dtype} {list(got.shape)}, stock {wanted.dtype} {list(wanted.shape)}"]
    if not wanted.isfinite().all():
        return [] if torch.equal(got.isfinite(), wanted.isfinite()) else ["finite elsewhere than stock's"]
    error = ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
    return [] if error <= bound else [f"error {error:.3g} against stock, expected at most {bound}"]


def _scheduler_of(module, plan):
    import inspect

    made = getattr(module, plan["name"])
    stock = getattr(diffusers, plan["name"])
    known = inspect.signature(stock.__init__).parameters
    return made(**{name: plan[name] for name in OPTIONS["scheduler"]() if name in known})


def _steps(scheduler, plan):
    """The sample after each step, with a model that is a fixed function of the sample.

    Not one such as a sine: where a step leaves samples of 10^5 (PNDM, squaredcos_cap_v2, trailing), what float32 cannot
    hold of them would be as large as the sine, and stock as far from float64 as ours.
    """
    scheduler.set_timesteps(plan["steps"])
    torch.manual_seed(plan["seed"])
    sample, generator = torch.randn(plan["N"], 4, plan["H"], plan["W"]), torch.Generator().manual_seed(plan["seed"])
    more = {"eta": plan["eta"], "generator": generator} if plan["name"] == "DDIMScheduler" else {}
    more = {"generator": generator} if plan["name"] == "DDPMScheduler" else more
    for t in scheduler.timesteps:
        output = 0.7 * torch.nn.functional.softsign(sample) + 0.1
        sample = scheduler.step(output, t, sample, **more).prev_sample
        yield sample


def _compare_scheduler(plan):
    import ldmfast

    if plan["name"] == "PNDMScheduler" and plan["prediction_type"] == "v_prediction":
        return 0, []  # ours keeps v in the multistep part, by choice
    if plan["rescale_betas_zero_snr"] and plan["prediction_type"] == "epsilon":
        return 0, []  # stock divides by zero; ours says that epsilon does not determine x0
    try:
        wanted = list(_steps(_scheduler_of(diffusers, plan), plan))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return 0, []
    # DDIM with eta 1, from pure noise: 1 - b - s^2 is 0, and stock takes the root of what float32 leaves of it, 2e-4 at
    # most, or NaN where that is below 0
    ends_in_noise = plan["rescale_betas_zero_snr"] or plan["beta_schedule"] == "squaredcos_cap_v2"
    rounded = plan["name"] == "DDIMScheduler" and plan["eta"] == 1.0 and ends_in_noise
    for number, (got, true) in enumerate(zip(_steps(_scheduler_of(ldmfast, plan), plan), wanted, strict=True)):
        if rounded and got.isfinite().all() and not true.isfinite().all():
            break
        if found := _difference(got, true, 1e-3 if rounded else FARTHEST):
            return 1, [f"step {number}: {sentence}" for sentence in found]
    return 1, []


def faults(plan: dict) -> tuple[int, list[str]]:
    """(1 if stock took the plan, else 0; what is wrong)"""
    torch.set_num_threads(1)
    return (_compare_scheduler if plan["network"] == "scheduler" else _compare_network)(plan)
