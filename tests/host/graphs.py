"""Graphs of the pack's own nodes beside their native twins. Every link is [node id, output]."""

from __future__ import annotations

from typing import Any

from host.tiny_models import TinyModels

Graph = dict[str, dict[str, Any]]
STEPS, SHIFT, CFG, SEED = 6, 5.0, 5.0, 3


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def animated(images: list[Any], fps: float = 16.0) -> dict[str, Any]:
    """ComfyUI's node for an animated WebP, which Pillow writes: no codec of PyAV's is needed."""
    how = {"filename_prefix": "video/webp", "lossless": False, "quality": 80, "method": "fastest"}
    return node("SaveAnimatedWEBP", images=images, fps=fps, **how)


def keep(graph: Graph, *names: str) -> Graph:
    """Carry the first output of each named node out of the graph, as keep_<name>."""
    return {**graph, **{f"keep_{name}": node("FixtureKeep", value=[name, 0]) for name in names}}


def base(models: TinyModels) -> Graph:
    """Both loaders of the same transformer, random conditioning, an empty latent of 128x96, 17 frames.

    In fp32, which is what auto means on a CPU: on a GPU the twins then differ no more than there.
    """
    return {
        "ours": node("LightX2VLoadModel", original_ckpt=models.diffusion_model, dtype="fp32"),
        "unet": node("UNETLoader", unet_name=models.diffusion_model, weight_dtype="default"),
        "native": node("ModelSamplingSD3", model=["unet", 0], shift=SHIFT),
        "positive": node("FixtureWanConditioning", seed=1, tokens=512),
        "negative": node("FixtureWanConditioning", seed=2, tokens=512),
        "empty": node("LightX2VEmptyLatent", width=128, height=96, length=17, family="wan2.1", batch_size=1),
    }


def random_latent(seed: int = 5) -> dict[str, Any]:
    """Normal numbers in place of an empty latent of 128x96, 17 frames."""
    return node("FixtureRandomLatent", seed=seed, channels=16, frames=5, height=12, width=16)


def our_sampler(latent: str = "empty", **changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["ours", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent": [latent, 0],
        "seed": SEED,
        "steps": STEPS,
        "cfg": CFG,
        "shift": SHIFT,
        "scheduler": "euler",
        "attention": "auto",
        "offload": "auto",
        "cache": "none",
    }
    return node("LightX2VSampler", **{**inputs, **changes})


def native_sampler(latent: str = "empty", start: int = 0, end: int = 10000, **changes: Any) -> dict[str, Any]:
    """KSampler (Advanced): steps start to end; it adds noise only from step 0 and leaves noise when it stops early."""
    inputs = {
        "model": ["native", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": [latent, 0],
        "add_noise": "enable" if start == 0 else "disable",
        "noise_seed": SEED,
        "steps": STEPS,
        "cfg": CFG,
        "sampler_name": "euler",
        "scheduler": "simple",
        "start_at_step": start,
        "end_at_step": end,
        "return_with_leftover_noise": "enable" if end < STEPS else "disable",
    }
    return node("KSamplerAdvanced", **{**inputs, **changes})


def text_to_video(models: TinyModels, steps: int = 3) -> Graph:
    """Prompt to mp4 with this pack's nodes alone."""
    return {
        **base(models),
        "text": node("LightX2VLoadTextEncoder", text_encoder=models.text_encoder),
        "positive": node("LightX2VTextEncode", encoder=["text", 0], text="a red circle moves right"),
        "negative": node("LightX2VTextEncode", encoder=["text", 0], text=""),
        "sample": our_sampler(steps=steps, scheduler="unipc"),
        "vae": node("LightX2VLoadVAE", vae_name=models.vae),
        "decode": node("LightX2VDecode", latent=["sample", 0], vae=["vae", 0]),
        "video": node("CreateVideo", images=["decode", 0], fps=16.0),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="video/ours", format="mp4", codec="h264"),
    }
