"""Wan's own parameter names and diffusers' for the same tensors.

Source: the modules of Wan2.1 wan/modules/model.py and of diffusers' WanTransformer3DModel. The table is of modules, so
it serves checkpoints ("blocks.0.attn1.to_q.weight") and LoRA files ("blocks.0.attn1.to_q.lora_A.weight") alike.
"""

import re

from lightx2v.checkpoint import Header
from lightx2v.models import Dialect

BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
# Inside a block: Wan's own name, diffusers' name.
IN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
# Outside the blocks. patch_embedding has one name in both.
OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_FROM_IN_BLOCK = {theirs: ours for ours, theirs in IN_BLOCK.items()}
_FROM_OUTSIDE = {theirs: ours for ours, theirs in OUTSIDE.items()}


def to_diffusers(name: str) -> str:
    """Wan's own name of a module or of anything in it -> diffusers'; a name that is in no table stays as it is."""
    return _renamed(name, IN_BLOCK, OUTSIDE)


def from_diffusers(name: str) -> str:
    """diffusers' name of a module or of anything in it -> Wan's own; a name that is in no table stays as it is."""
    return _renamed(name, _FROM_IN_BLOCK, _FROM_OUTSIDE)


def _renamed(name: str, in_block: dict[str, str], outside: dict[str, str]) -> str:
    block = BLOCK.fullmatch(name)
    start, rest, table = (block[1], block[2], in_block) if block else ("", name, outside)
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):
        if found := table.get(".".join(parts[:length])):
            return start + ".".join([found, *parts[length:]])
    return name


def _is_diffusers(header: Header) -> bool:
    return any(name.startswith("condition_embedder.text_embedder.linear_1") for name in header.tensors)


DIALECTS = (Dialect("diffusers", _is_diffusers, lambda header: header.renamed_by(from_diffusers)),)
