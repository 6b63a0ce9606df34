"""norm_rope(x (B, L, H·d), weight, cos (L, d/2), sin (L, d/2), eps) -> (B, L, H, d): RMS norm, then rotary embedding.

What a query or key goes through between its projection and attention, in one pass and with one rounding.
weight (H·d,): the norm is over all channels (Wan); weight (d,): over each head (HunyuanVideo-1.5). d is twice the width
of cos; see `norm` and `rope` for the two formulas.
"""

from typing import Any

import torch

from lightx2v_kernels.norm_rope.reference import norm_rope
from lightx2v_kernels.registry import Op


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Three heads normed together, then each by itself as the q of a fused projection (strided), weights in fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 3, 3 * head_dim, generator=generator).to(device, dtype)
    weight = (1 + 0.2 * torch.randn(3 * head_dim, generator=generator)).to(device, dtype)
    angles = 10 * torch.rand(33, head_dim // 2, generator=generator)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    return (
        (x[:, :, 0].contiguous(), weight, cos, sin, 1e-6),
        (x[:, :, 1], weight[:head_dim], cos, sin, 1e-6),
        (x[:, :, 2], weight.float(), cos, sin, 1e-6),
    )


OPS = (Op("norm_rope", norm_rope, examples),)
