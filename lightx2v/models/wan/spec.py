"""Wan checkpoints: what their headers look like and which network they mean."""

import re
from collections.abc import Callable

from torch import nn

from lightx2v.checkpoint import Header
from lightx2v.latents import WAN21
from lightx2v.models import ModelSpec
from lightx2v.models.wan.config import HEAD_DIM, WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import Kernels


def read_config(header: Header) -> WanConfig:
    """Every size from the shapes of the tensors; call it on a header that `is_wan` accepts."""
    patch = header.tensors["patch_embedding.weight"].shape
    out = header.tensors["head.head.weight"].shape[0]
    patch_size = (patch[2], patch[3], patch[4])
    layers = {int(m[1]) for name in header.tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    return WanConfig(
        hidden_size=patch[0],
        ffn_size=header.tensors["blocks.0.ffn.0.weight"].shape[0],
        num_layers=max(layers) + 1,
        in_channels=patch[1],
        out_channels=out // (patch_size[0] * patch_size[1] * patch_size[2]),
        text_dim=header.tensors["text_embedding.0.weight"].shape[1],
        freq_dim=header.tensors["time_embedding.0.weight"].shape[1],
        patch_size=patch_size,
    )


def is_wan(header: Header) -> bool:
    """The original key layout of any Wan diffusion transformer."""
    ranks = {
        "patch_embedding.weight": 5,
        "head.head.weight": 2,
        "head.modulation": 3,
        "blocks.0.ffn.0.weight": 2,
        "blocks.0.self_attn.norm_q.weight": 1,
        "text_embedding.0.weight": 2,
        "time_embedding.0.weight": 2,
    }
    return all(len(header.shape(name) or ()) == rank for name, rank in ranks.items())


def _is_t2v(header: Header) -> bool:
    if not is_wan(header):
        return False
    config = read_config(header)
    conditioned = any(name.startswith(("img_emb.", "blocks.0.cross_attn.k_img.")) for name in header.tensors)
    return config.in_channels == config.out_channels == WAN21.channels and not conditioned


def _is_t2v_of(hidden_size: int, num_layers: int, header: Header) -> bool:
    if not _is_t2v(header):
        return False
    config = read_config(header)
    return (config.hidden_size, config.num_layers) == (hidden_size, num_layers)


PUBLISHED = ((1536, 30), (5120, 40))


def _build(config: WanConfig, kernels: Kernels) -> nn.Module:
    return WanTransformer(config, kernels)


def keep_float32(name: str) -> bool:
    """Timestep path, modulation and affine norms are small and sensitive; Wan and diffusers keep them in float32."""
    return name.startswith(("time_embedding.", "time_projection.")) or name.endswith("modulation") or ".norm3." in name


def _t2v(name: str, title: str, matches: Callable[[Header], bool]) -> ModelSpec:
    return ModelSpec(
        name=name,
        title=title,
        family="wan",
        task="t2v",
        matches=matches,
        config=read_config,
        build=_build,
        keep_float32=keep_float32,
        head_dim=HEAD_DIM,
        latents=WAN21,
        patch_size=(1, 2, 2),
    )


SPECS = (
    _t2v("wan2.1_t2v_1.3b", "Wan2.1 T2V 1.3B", lambda header: _is_t2v_of(1536, 30, header)),
    # One layout, two models: a file alone cannot tell Wan2.1-T2V-14B from an expert of Wan2.2-T2V-A14B.
    _t2v("wan2.1_t2v_14b", "Wan2.1 T2V 14B", lambda header: _is_t2v_of(5120, 40, header)),
    _t2v(
        "wan2.1_t2v",
        "Wan2.1 T2V",
        lambda header: _is_t2v(header) and not any(_is_t2v_of(*size, header) for size in PUBLISHED),
    ),
)
