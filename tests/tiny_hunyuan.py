"""A small HunyuanVideo-1.5 transformer of random weights, and its state dict as others lay it out."""

import re
from dataclasses import replace

import torch
from torch import Tensor

from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.models.hunyuan_video_15.transformer import HunyuanTransformer
from lightx2v_kernels import select

State = dict[str, Tensor]
CONFIG = HunyuanConfig(
    hidden_size=256,
    ffn_size=1024,
    num_layers=3,
    refiner_layers=2,
    refiner_ffn_size=1024,
    in_channels=65,
    out_channels=32,
    text_dim=48,
    glyph_dim=1472,  # ComfyUI fixes this, the next, and the two refiner blocks
    glyph_size=2048,
    image_dim=36,
    freq_dim=256,
    patch_size=(1, 1, 1),
)
DISTILLED = replace(CONFIG, reads_step_end=True)

# Replaced one after the other. Written apart from the engine's own tables, which read these layouts.
TO_DIFFUSERS = (
    (r"^txt_in\.individual_token_refiner\.blocks", "context_embedder.token_refiner.refiner_blocks"),
    (r"^txt_in\.t_embedder\.mlp\.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    (r"^txt_in\.t_embedder\.mlp\.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    (r"^txt_in\.c_embedder", "context_embedder.time_text_embed.text_embedder"),
    (r"^txt_in\.input_embedder", "context_embedder.proj_in"),
    (r"\.self_attn_([qkv])\.", r".attn.to_\1."),
    (r"\.self_attn_proj", ".attn.to_out.0"),
    (r"(refiner_blocks\.\d+)\.adaLN_modulation\.1", r"\1.norm_out.linear"),
    (r"(refiner_blocks\.\d+)\.mlp", r"\1.ff"),
    (r"^byt5_in\.fc(\d)", r"context_embedder_2.linear_\1"),
    (r"^byt5_in\.layernorm", "context_embedder_2.norm"),
    (r"^vision_in\.proj\.0", "image_embedder.norm_in"),
    (r"^vision_in\.proj\.1", "image_embedder.linear_1"),
    (r"^vision_in\.proj\.3", "image_embedder.linear_2"),
    (r"^vision_in\.proj\.4", "image_embedder.norm_out"),
    (r"^time_in\.mlp\.0", "time_embed.timestep_embedder.linear_1"),
    (r"^time_in\.mlp\.2", "time_embed.timestep_embedder.linear_2"),
    (r"^time_r_in\.mlp\.0", "time_embed.timestep_embedder_r.linear_1"),
    (r"^time_r_in\.mlp\.2", "time_embed.timestep_embedder_r.linear_2"),
    (r"^img_in", "x_embedder"),
    (r"^cond_type_embedding", "cond_type_embed"),
    (r"^final_layer\.linear", "proj_out"),
    (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
    (r"^double_blocks", "transformer_blocks"),
    (r"img_mod\.linear", "norm1.linear"),
    (r"txt_mod\.linear", "norm1_context.linear"),
    (r"img_attn_([qkv])\.", r"attn.to_\1."),
    (r"txt_attn_([qkv])\.", r"attn.add_\1_proj."),
    (r"img_attn_([qk])_norm", r"attn.norm_\1"),
    (r"txt_attn_([qk])_norm", r"attn.norm_added_\1"),
    (r"img_attn_proj", "attn.to_out.0"),
    (r"txt_attn_proj", "attn.to_add_out"),
    (r"img_mlp", "ff"),
    (r"txt_mlp", "ff_context"),
    (r"(ff|ff_context)\.fc1", r"\1.net.0.proj"),
    (r"(ff|ff_context)\.fc2", r"\1.net.2"),
)
TO_COMFYUI = (
    (r"_mod\.linear", "_mod.lin"),
    (r"(img|txt)_attn_q_norm\.weight", r"\1_attn.norm.query_norm.scale"),
    (r"(img|txt)_attn_k_norm\.weight", r"\1_attn.norm.key_norm.scale"),
    (r"(img|txt)_attn_(qkv|proj)", r"\1_attn.\2"),
    (r"self_attn_(qkv|proj)", r"self_attn.\1"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
    (r"(time_in|time_r_in|t_embedder)\.mlp\.0", r"\1.in_layer"),
    (r"(time_in|time_r_in|t_embedder)\.mlp\.2", r"\1.out_layer"),
    (r"c_embedder\.linear_1", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2", "c_embedder.out_layer"),
)


def make_tiny(config: HunyuanConfig = CONFIG) -> HunyuanTransformer:
    kernels = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)
    model = HunyuanTransformer(config, kernels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "_norm." in name:
            parameter.copy_(1.5 + 0.3 * noise)
        elif ".norm" in name or "layernorm" in name or "proj.0." in name or "proj.4." in name:
            parameter.copy_((1 if name.endswith("weight") else 0) + 0.2 * noise)
        elif name.startswith("cond_type"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    return model


def to_diffusers(state: State) -> State:
    """q, k and v apart everywhere, and the head's scale above its shift."""
    apart: State = {}
    for name, tensor in state.items():
        if "self_attn_qkv" in name:
            apart |= {name.replace("qkv", part): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            apart[name] = tensor.roll(len(tensor) // 2, 0) if name.startswith("final_layer.adaLN") else tensor
    return _renamed(apart, TO_DIFFUSERS)


def to_merged(state: State) -> State:
    """The original names, with q, k and v one layer, as in ComfyUI's repackaged files."""
    merged: State = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(double_blocks.+_attn_)q(\.weight|\.bias)", name):
            merged[f"{found[1]}qkv{found[2]}"] = torch.cat([state[f"{found[1]}{part}{found[2]}"] for part in "qkv"])
        elif not re.fullmatch(r"double_blocks.+_attn_[kv]\.(weight|bias)", name):
            merged[name] = tensor
    return merged


def to_comfyui(state: State) -> State:
    """The names of ComfyUI's own modules, as in files that it saves."""
    return _renamed(to_merged(state), TO_COMFYUI)


def _renamed(state: State, table: tuple[tuple[str, str], ...]) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    assert len(renamed) == len(state)
    return renamed
