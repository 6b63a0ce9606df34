"""A HunyuanVideo-1.5 folder of small random weights, in the layouts that people have, and a clip of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tiny_encoders15 as encoders
from lightx2v import LightX2VPipeline
from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from tiny_hunyuan import CONFIG, State, make_tiny, to_diffusers
from tiny_vae import tiny_vae15

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 2}
GLYPHS = replace(encoders.BYT5, hidden_size=96, head_dim=16)
FITTING = replace(
    CONFIG,
    num_layers=1,
    ffn_size=256,
    refiner_ffn_size=256,
    text_dim=encoders.QWEN.hidden_size,
    glyph_dim=GLYPHS.hidden_size,
    glyph_size=64,
    image_dim=encoders.SIGLIP.hidden_size,
)
PLACES = {
    "original": {
        "transformer": "transformer/480p_t2v/diffusion_pytorch_model.safetensors",
        "language": "text_encoder/llm/model.safetensors",
        "tokenizer": "text_encoder/llm",
        "glyphs": "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt",
        "siglip": "vision_encoder/siglip/image_encoder/model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
    },
    "diffusers": {
        "transformer": "transformer/diffusion_pytorch_model.safetensors",
        "language": "text_encoder/model.safetensors",
        "tokenizer": "tokenizer",
        "glyphs": "text_encoder_2/model.safetensors",
        "siglip": "image_encoder/model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
    },
    "comfyui": {
        "transformer": "hunyuanvideo1.5_480p_t2v_fp16.safetensors",
        "language": "qwen_2.5_vl_7b.safetensors",
        "tokenizer": "tokenizer",
        "glyphs": "byt5_small_glyphxl_fp16.safetensors",
        "siglip": "sigclip_vision_patch14_384.safetensors",
        "vae": "hunyuanvideo15_vae_fp16.safetensors",
    },
}


def write(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save({"state_dict": {_glyph_name(name): tensor for name, tensor in state.items()}}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def _glyph_name(name: str) -> str:
    """Glyph-SDXL-v2's trainer's."""
    return f"module.text_tower.{'encoder.embed_tokens.weight' if name == 'shared.weight' else name}"


def write_folder(root: Path, layout: str = "original", config: HunyuanConfig = FITTING) -> Path:
    """A whole folder, inside root."""
    folder, places = root / layout, PLACES[layout]
    transformer = make_tiny(config).state_dict()
    write(to_diffusers(transformer) if layout == "diffusers" else transformer, folder / places["transformer"])
    language = encoders.qwen_state()
    if layout == "diffusers":  # the text model alone
        language = {name.removeprefix("model."): t for name, t in language.items() if name.startswith("model.")}
    write(language, folder / places["language"])
    encoders.write_tokenizer(folder / places["tokenizer"])
    write(encoders.byt5_state(GLYPHS), folder / places["glyphs"])
    write(encoders.siglip_state(), folder / places["siglip"])
    write(tiny_vae15().state_dict(), folder / places["vae"])
    return folder


def pipeline(
    folder: Path, model_cls: str = "hunyuan_video_1.5", task: str = "t2v", device: str = "cpu", **changes: Any
) -> LightX2VPipeline:
    pipe = LightX2VPipeline(folder, model_cls, task, device=device)
    pipe.create_generator(**{**SMALL, **changes})
    return pipe


def video(pipe: LightX2VPipeline, **changes: Any) -> torch.Tensor:
    arguments = {"seed": 1, "prompt": "a red cat", "return_result_tensor": True, "progress": False, **changes}
    made = pipe.generate(**arguments)["video"]
    assert made is not None and made.std() > 0.001
    return made
