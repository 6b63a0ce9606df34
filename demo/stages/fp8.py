"""Transformers as 8-bit files: float8_e4m3fn weights and float32 scales, in two published layouts, and back.

`lightx2v`: the linears of the blocks, one `weight_scale` (rows, 1) for each output channel; everything else bfloat16
(LightX2V tools/convert/converter.py, wan_dit). `comfy`: every 2D weight, one `scale_weight` for each tensor, an empty
tensor `scaled_fp8` as the mark; everything else float16 (Comfy-Org's wan2.2_*_fp8_scaled.safetensors).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.\w+\.weight")


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-LARGEST, LARGEST).to(FP8)


def to_lightx2v(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float weights in Wan's names -> tensors of LightX2V's scaled fp8 layout."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        weight = value.detach().float().cpu()
        if _BLOCK_LINEAR.fullmatch(name) and weight.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
            tensors[name], tensors[f"{name}_scale"] = _rounded(weight, scale), scale
        else:
            tensors[name] = weight.bfloat16()
    return tensors


def to_comfy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float weights in Wan's names -> tensors of ComfyUI's fp8_scaled layout; activations are not scaled."""
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.empty(0, dtype=FP8)}
    for name, value in weights.items():
        weight = value.detach().float().cpu()
        if weight.ndim == 2 and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            scale = weight.abs().max().clamp(min=1e-12) / LARGEST
            tensors[name], tensors[f"{layer}.scale_weight"] = _rounded(weight, scale), scale
            tensors[f"{layer}.scale_input"] = torch.ones(())
        else:
            tensors[name] = weight.half()
    return tensors


def read_fp8(path: Path) -> dict[str, Tensor]:
    """The float32 weights, in Wan's names, that a file of either layout stands for."""
    tensors = load_file(path)
    weights = {}
    for name, value in tensors.items():
        if name == "scaled_fp8" or name.endswith(("_scale", ".scale_weight", ".scale_input")):
            continue
        if value.dtype == FP8:
            layer = name.removesuffix(".weight")
            scale = tensors.get(f"{name}_scale", tensors.get(f"{layer}.scale_weight"))
            if scale is None:
                raise ValueError(f"{path}: '{name}' is 8-bit and has neither weight_scale nor scale_weight")
            weights[name] = value.float() * scale
        else:
            weights[name] = value.float()
    return weights


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> int:
    """Write a safetensors file under a temporary name, then rename it; returns its bytes.

    Raises FloatingPointError for values that the file's types cannot hold.
    """
    for name, value in tensors.items():
        if not value.float().isfinite().all():
            raise FloatingPointError(f"{path.name}: '{name}' does not fit {value.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, fresh, dict(metadata))
    os.replace(fresh, path)
    return path.stat().st_size
