"""A pipeline over tiny files, and the video that it makes."""

from pathlib import Path

import torch

from host.tiny_models import write_tiny_models
from lightx2v import LightX2VPipeline
from lightx2v.identify import identify
from lightx2v.offload import Plan
from tiny_lora import write

SMALL = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 2}


def write_folder(models: Path, wan: Path) -> Path:
    """Wan's own file names, in `wan`; `models` is used on the way."""
    names = write_tiny_models(models)
    for source, target in (
        (models / "diffusion_models" / names.diffusion_model, "diffusion_pytorch_model.safetensors"),
        (models / "text_encoders" / names.text_encoder, "models_t5_umt5-xxl-enc.safetensors"),
        (models / "vae" / names.vae, "Wan2.1_VAE.safetensors"),
    ):
        source.rename(wan / target)
    return wan


def pipeline(folder: Path, **options) -> LightX2VPipeline:
    pipe = LightX2VPipeline(folder, **options)
    pipe.create_generator(**SMALL)
    return pipe


def video(pipe: LightX2VPipeline, **changes) -> torch.Tensor:
    frames = pipe.generate(1, "a red circle", return_result_tensor=True, progress=False, **changes)["video"]
    assert frames is not None
    return frames


def plan_of(pipe: LightX2VPipeline) -> Plan:
    assert pipe.memory_plan is not None
    return pipe.memory_plan


def lora(folder: Path, path: Path) -> Path:
    """Of two of the transformer's layers."""
    header = identify(folder / "diffusion_pytorch_model.safetensors").header
    generator = torch.Generator().manual_seed(0)
    content = {}
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        size_out, size_in = header.tensors[f"{name}.weight"].shape
        content[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, size_in, generator=generator) / size_in**0.5
        content[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(size_out, 4, generator=generator)
    return write(path, content)
