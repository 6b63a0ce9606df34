"""A narrow image encoder for tests, with weights in which every term shows, in the layouts that are published."""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.vision.clip import empty
from lightx2v.vision.layout import Sizes

SIZES = Sizes(hidden_size=160, ffn_size=320, num_layers=4, patch_size=14, grid=4, projection_size=64)
CONFIG = {
    "hidden_size": 160,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
    "projection_dim": 64,
    "hidden_act": "gelu",
}
"""The same sizes in the words of transformers and ComfyUI."""


def state_dict(size: Sizes = SIZES, *, seed: int = 0) -> dict[str, Tensor]:
    """As in ComfyUI's clip_vision_h.safetensors; gains far from 1, biases far from 0, attention far from flat."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in empty(size).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor = 1 + 0.3 * normal
        elif name.endswith("bias"):
            tensor = 0.2 * normal
        elif "position" in name or "class" in name:
            tensor = normal
        else:
            tensor = normal * normal[0].numel() ** -0.5 * (2 if ".q_proj" in name or ".k_proj" in name else 1)
        state[name] = tensor
    state["vision_model.embeddings.position_ids"] = torch.arange(size.grid**2 + 1)[None]
    return state


def original(state: dict[str, Tensor], layers: int = SIZES.num_layers) -> dict[str, Tensor]:
    """The same weights as in Wan2.1's own file, with some of the text tower."""
    top = "vision_model."
    wan = {
        "log_scale": torch.tensor(2.6),
        "visual.cls_embedding": state[f"{top}embeddings.class_embedding"][None, None],
        "visual.pos_embedding": state[f"{top}embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state[f"{top}embeddings.patch_embedding.weight"],
        "visual.head": state["visual_projection.weight"].T.contiguous(),
        "textual.token_embedding.weight": torch.randn(7, 8),
        "textual.blocks.0.norm1.weight": torch.randn(8),
    }
    for kind in ("weight", "bias"):
        wan[f"visual.pre_norm.{kind}"] = state[f"{top}pre_layrnorm.{kind}"]
        wan[f"visual.post_norm.{kind}"] = state[f"{top}post_layernorm.{kind}"]
        for index in range(layers):
            theirs, ours = f"visual.transformer.{index}", f"{top}encoder.layers.{index}"
            qkv = [state[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            wan[f"{theirs}.attn.to_qkv.{kind}"] = torch.cat(qkv)
            wan[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
            wan[f"{theirs}.norm1.{kind}"] = state[f"{ours}.layer_norm1.{kind}"]
            wan[f"{theirs}.norm2.{kind}"] = state[f"{ours}.layer_norm2.{kind}"]
            wan[f"{theirs}.mlp.0.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            wan[f"{theirs}.mlp.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
    return wan


def quantised(wan: dict[str, Tensor], dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """Wan's names with the matrices of attention and feed-forward in 8 bits, a scale for each row, as LightX2V writes
    them; the rest in float16, no text tower."""
    largest = float(torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max)
    packed = {}
    for name, tensor in wan.items():
        if name.startswith("textual."):
            continue
        if ".transformer." in name and name.endswith("weight") and tensor.ndim == 2:
            scale = tensor.abs().amax(1, keepdim=True) / largest
            rows = tensor / scale
            packed[name] = (rows.round() if dtype == torch.int8 else rows).to(dtype)
            packed[f"{name}_scale"] = scale
        else:
            packed[name] = tensor.half()
    return packed


def picture(height: int = 56, width: int = 56, *, batch: int = 1, seed: int = 3) -> Tensor:
    """Images (B, H, W, 3) in [0, 1] of large and small detail."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1)
    return (0.7 * smooth + 0.3 * torch.rand(batch, height, width, 3, generator=generator)).clamp(0, 1)
