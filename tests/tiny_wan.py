"""A Wan2.1 folder of small random weights, the same in 8 bits, and a clip of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from host.tiny_models import write_tiny_models
from lightx2v import LightX2VPipeline

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 2}
T5, DIT = "models_t5_umt5-xxl-enc.safetensors", "diffusion_pytorch_model.safetensors"


def write_folder(root: Path) -> Path:
    """A model folder in Wan's own layout, inside root."""
    names, wan = write_tiny_models(root), root / "wan"
    wan.mkdir()
    (root / "diffusion_models" / names.diffusion_model).rename(wan / DIT)
    (root / "text_encoders" / names.text_encoder).rename(wan / T5)
    (root / "vae" / names.vae).rename(wan / "Wan2.1_VAE.safetensors")
    return wan


def quantised(source: Path, target: Path, *parts: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Path:
    """LightX2V's layout: `weight` in 8 bits with a `weight_scale` a row, where a name holds one of parts."""
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    tensors = {}
    for name, tensor in load_file(source).items():
        if name.endswith(".weight") and tensor.ndim == 2 and any(part in name for part in parts):
            scale = tensor.abs().amax(1, keepdim=True).clamp(min=1e-8).float() / limit
            scaled = tensor / scale
            tensors[name] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target)
    return target


def video(pipe: LightX2VPipeline, **changes: Any) -> torch.Tensor:
    arguments = {"seed": 1, "prompt": "a red circle", "return_result_tensor": True, "progress": False, **changes}
    made = pipe.generate(**arguments)["video"]
    assert made is not None and made.std() > 0.01
    return made


def pipeline(folder: Path, **changes: Any) -> LightX2VPipeline:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**{**SMALL, **changes})
    return pipe
