"""A file that `lightx2v quantize --layout comfy` wrote, in ComfyUI's own model and in ours."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

from closeness import relative_error
from demo.shipped import T2V
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.quant.writing import write_quantised

CPU = torch.device("cpu")


@torch.inference_mode()
def test_comfyui_reads_what_we_write(comfy: ModuleType, tmp_path: Path) -> None:
    """ComfyUI computes what it restores in bfloat16 at best; a scale that is lost or another would be far off."""
    path = tmp_path / "m.safetensors"
    write_quantised(T2V, path, "fp8", "comfy")
    patcher = importlib.import_module("comfy.sd").load_diffusion_model(str(path), {"dtype": torch.float32})
    theirs = patcher.model.diffusion_model
    info = identify(path)
    ours = load_transformer(info, Engine(dtype="fp32"), CPU)
    for name in ("blocks.0.self_attn.q", "blocks.5.ffn.2"):
        weight = theirs.get_submodule(name).weight
        restored = weight.dequantize() if hasattr(weight, "dequantize") else weight
        assert relative_error(restored.float(), ours.get_submodule(name).weight) < 2e-3
    latents, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 12, info.config.text_dim)
    wanted = ours(latents, torch.tensor([500.0]), text)
    found = theirs(latents, torch.tensor([500.0]), text)
    assert relative_error(found.float(), wanted) < 2e-2
    plain = load_transformer(identify(T2V), Engine(dtype="fp32"), CPU)(latents, torch.tensor([500.0]), text)
    assert relative_error(found.float(), plain) > relative_error(found.float(), wanted)
