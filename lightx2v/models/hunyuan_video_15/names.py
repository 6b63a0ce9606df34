"""HunyuanVideo-1.5's own parameter names, and diffusers' and ComfyUI's layouts of the same tensors.

Both differ in more than names. In the blocks the original keeps q, k and v apart, in the refiner of the text as one
layer: diffusers keeps them apart in both, ComfyUI has one layer in both. And the head's shift and scale are the other
way round in diffusers.
Source: the modules of hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py, of diffusers'
HunyuanVideo15Transformer3DModel and of ComfyUI comfy/ldm/hunyuan_video/model.py.
"""

import re

from lightx2v.checkpoint import Header
from lightx2v.checkpoint.pieces import join, split, swapped
from lightx2v.models import Dialect

BLOCK = re.compile(r"(?:transformer_blocks|double_blocks)\.(\d+)\.(.+)")
REFINER = re.compile(
    r"(?:context_embedder\.token_refiner\.refiner_blocks|txt_in\.individual_token_refiner\.blocks)\.(\d+)\.(.+)"
)
OWN_BLOCK, OWN_REFINER = "double_blocks", "txt_in.individual_token_refiner.blocks"
HEAD = "final_layer.adaLN_modulation.1"
# Modules inside a block: diffusers' name, our own.
IN_BLOCK = {
    "norm1.linear": "img_mod.linear",
    "attn.to_q": "img_attn_q",
    "attn.to_k": "img_attn_k",
    "attn.to_v": "img_attn_v",
    "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm",
    "attn.to_out.0": "img_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "norm1_context.linear": "txt_mod.linear",
    "attn.add_q_proj": "txt_attn_q",
    "attn.add_k_proj": "txt_attn_k",
    "attn.add_v_proj": "txt_attn_v",
    "attn.norm_added_q": "txt_attn_q_norm",
    "attn.norm_added_k": "txt_attn_k_norm",
    "attn.to_add_out": "txt_attn_proj",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}
IN_REFINER = {
    "attn.to_q": "self_attn_q",  # put together as self_attn_qkv
    "attn.to_k": "self_attn_k",
    "attn.to_v": "self_attn_v",
    "attn.to_out.0": "self_attn_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm_out.linear": "adaLN_modulation.1",
}
OUTSIDE = {
    "x_embedder": "img_in",
    "time_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_embed.timestep_embedder_r.linear_1": "time_r_in.mlp.0",
    "time_embed.timestep_embedder_r.linear_2": "time_r_in.mlp.2",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
    "context_embedder_2.norm": "byt5_in.layernorm",
    "context_embedder_2.linear_1": "byt5_in.fc1",
    "context_embedder_2.linear_2": "byt5_in.fc2",
    "context_embedder_2.linear_3": "byt5_in.fc3",
    "image_embedder.norm_in": "vision_in.proj.0",
    "image_embedder.linear_1": "vision_in.proj.1",
    "image_embedder.linear_2": "vision_in.proj.3",
    "image_embedder.norm_out": "vision_in.proj.4",
    "cond_type_embed": "cond_type_embedding",
    "norm_out.linear": HEAD,
    "proj_out": "final_layer.linear",
}
# ComfyUI's own modules, as files that it saves have them; what it repackages keeps the original names but for the
# fused q, k and v.
COMFY_IN_BLOCK = {
    f"{stream}_{theirs}": f"{stream}_{ours}"
    for stream in ("img", "txt")
    for theirs, ours in {
        "mod.lin": "mod.linear",
        "attn.qkv": "attn_qkv",
        "attn.norm.query_norm": "attn_q_norm",
        "attn.norm.key_norm": "attn_k_norm",
        "attn.proj": "attn_proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }.items()
}
COMFY_IN_REFINER = {
    "self_attn.qkv": "self_attn_qkv",
    "self_attn.proj": "self_attn_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
COMFY_OUTSIDE = {
    "time_in.in_layer": "time_in.mlp.0",
    "time_in.out_layer": "time_in.mlp.2",
    "time_r_in.in_layer": "time_r_in.mlp.0",
    "time_r_in.out_layer": "time_r_in.mlp.2",
    "txt_in.t_embedder.in_layer": "txt_in.t_embedder.mlp.0",
    "txt_in.t_embedder.out_layer": "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.in_layer": "txt_in.c_embedder.linear_1",
    "txt_in.c_embedder.out_layer": "txt_in.c_embedder.linear_2",
}


def from_diffusers(name: str) -> str:
    """diffusers' name of a module or of anything in it -> our own; a name that is in no table stays as it is."""
    return _renamed(name, IN_BLOCK, IN_REFINER, OUTSIDE)


def from_comfyui(name: str) -> str:
    """The same for ComfyUI's; its q/k norms call their weight a scale."""
    name = re.sub(r"(_norm)\.scale$", r"\1.weight", name)
    return _renamed(name, COMFY_IN_BLOCK, COMFY_IN_REFINER, COMFY_OUTSIDE)


def _renamed(name: str, in_block: dict[str, str], in_refiner: dict[str, str], outside: dict[str, str]) -> str:
    for pattern, own, table in ((BLOCK, OWN_BLOCK, in_block), (REFINER, OWN_REFINER, in_refiner)):
        if found := pattern.fullmatch(name):
            return f"{own}.{found[1]}.{_looked_up(found[2], table)}"
    return _looked_up(name, outside)


def _looked_up(name: str, table: dict[str, str]) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if found := table.get(".".join(parts[:length])):
            return ".".join([found, *parts[length:]])
    return name


def _diffusers(header: Header) -> Header:
    header = header.renamed_by(from_diffusers)
    for owner in _owners(header, r"txt_in\..+\.self_attn_q"):
        base = owner.removesuffix("q")
        header = join(header, [base + part for part in "qkv"], f"{base}qkv")
    return swapped(header, HEAD)


def _comfyui(header: Header) -> Header:
    header = header.renamed_by(from_comfyui)
    for owner in _owners(header, r"double_blocks\.\d+\.(img|txt)_attn_qkv"):
        base = owner.removesuffix("qkv")
        header = split(header, owner, [base + part for part in "qkv"])
    return header


def _owners(header: Header, pattern: str) -> list[str]:
    return [found[1] for name in header.tensors if (found := re.fullmatch(rf"({pattern})\.weight", name))]


def _is_diffusers(header: Header) -> bool:
    """diffusers' other Hunyuan models have no second context embedder of this kind."""
    return {"x_embedder.proj.weight", "context_embedder_2.linear_3.weight", "cond_type_embed.weight"} <= set(
        header.tensors
    )


def _is_comfyui(header: Header) -> bool:
    names = header.tensors
    fused = any(f"double_blocks.0.img_attn{dot}qkv.weight" in names for dot in "_.")
    return fused and "cond_type_embedding.weight" in names


DIALECTS = (Dialect("diffusers", _is_diffusers, _diffusers), Dialect("comfyui", _is_comfyui, _comfyui))
