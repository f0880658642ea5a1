"""What users of diffusers' pipelines look for in ours: by which name it is here, or that it stays with diffusers."""

from __future__ import annotations

from collections.abc import Iterable

STAYS = (
    "stays with diffusers: ldmfast.optimize(diffusers.StableDiffusionPipeline.from_pretrained(...)) has it, over "
    "ldmfast's networks"
)
_SIZES = ("original_size", "crops_coords_top_left", "target_size", "aesthetic_score")
CALL = {  # the arguments of a call
    "prompt": "is the first argument here",
    "negative_prompt": "is called negative here",
    "num_inference_steps": "is called steps here",
    "guidance_scale": "is called guidance here",
    "generator": "is seeds here: a number, or one a picture",
    "num_images_per_prompt": "is the length of the first argument here: [prompt] * N, with seeds=S for S, S + 1, ...",
    "height": "is size=(width, height) here",
    "width": "is size=(width, height) here",
    "mask_image": "is called mask here",
    "scheduler": "is called sampler here",
    "output_type": "has no counterpart: a call gives PIL pictures; denoise() gives latents, decode() tensors",
    "return_dict": "has no counterpart: a call gives a list of PIL pictures",
    "callback": "is callback_on_step_end, here as in diffusers",
    "callback_steps": "is callback_on_step_end, here as in diffusers",
    "callback_on_step_end_tensor_inputs": "has no counterpart: a callback gets the latents",
    "cross_attention_kwargs": "has no counterpart: a LoRA's scale goes to ldmfast.load_lora(pipe, (FILE, scale))",
    **dict.fromkeys(("prompt_2", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds"), STAYS),
    **dict.fromkeys(("pooled_prompt_embeds", "negative_pooled_prompt_embeds", "latents", "timesteps", "sigmas"), STAYS),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds", "control_image", "denoising_start"), STAYS),
    **dict.fromkeys(("controlnet_conditioning_scale", "denoising_end", "pag_scale", "padding_mask_crop"), STAYS),
    **dict.fromkeys((*_SIZES, *(f"negative_{name}" for name in _SIZES)), STAYS),
}
LOAD = {  # the arguments of from_pretrained and from_single_file
    "torch_dtype": "is called dtype here",
    "vae": "is autoencoder=FILE or FOLDER here, or pipe.vae = ...",
    "scheduler": "is pipe.scheduler = ... here, or sampler= of a call",
    "original_config": "is called config here",
    "original_config_file": "is called config here",
    "safety_checker": "has no counterpart: no picture is looked at here",
    "requires_safety_checker": "has no counterpart: no picture is looked at here",
    "use_safetensors": "has no counterpart: what a pickle names is never run",
    **dict.fromkeys(
        ("revision", "cache_dir", "token", "force_download"), "has no counterpart: give a folder or a file"
    ),
    **dict.fromkeys(("device_map", "quantization_config", "low_cpu_mem_usage", "custom_pipeline", "controlnet"), STAYS),
}
ATTRIBUTES = {
    **dict.fromkeys(
        ("load_lora_weights", "unload_lora_weights", "set_adapters", "get_active_adapters", "fuse_lora", "unfuse_lora"),
        "is ldmfast.load_lora(pipe, FILE or (FILE, scale), ...) here, which replaces those before",
    ),
    "load_textual_inversion": "is ldmfast.load_embedding(pipe, FILE or (FILE, token), ...) here",
    "enable_vae_tiling": "is pipe.vae.enable_tiling() here",
    "enable_vae_slicing": "is pipe.vae.enable_slicing() here",
    "set_progress_bar_config": "is progress=True or False of a call here",
    "components": "is unet, vae, scheduler and conditioner here",
    "text_encoder": "is part of conditioner here",
    "tokenizer": "is part of conditioner here",
}


def unknown_arguments(who: str, given: Iterable[str], known: dict[str, str], taken: Iterable[str]) -> TypeError:
    """For arguments that `who` does not take: where the first of them is found."""
    name = next(iter(given))
    if name in known:
        return TypeError(f"{name} {known[name]}")
    return TypeError(f"{who} takes no {name}; it takes {', '.join(taken)}")


def missing_attribute(who: str, name: str) -> AttributeError:
    """For an attribute that `who` lacks: where it is found, if a pipeline of diffusers' has it."""
    plain = f"{who!r} object has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(plain)
    if name in ATTRIBUTES:
        return AttributeError(f"{plain}: it {ATTRIBUTES[name]}")
    import diffusers

    there = any(
        hasattr(kind, name) for kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)
    )
    return AttributeError(f"{plain}: it {STAYS}" if there else plain)
