"""rope(x (B, L, H, D), cos (L, D/2), sin (L, D/2)) -> (B, L, H, D): rotary position embedding.

Turns the pair (x[2i], x[2i+1]) of token l by the angle whose cosine is cos[l, i]. cos and sin are fp32, the maths is
fp32, the result has the dtype of x. Which angle belongs to which token is the model's business.
Source: Su et al. 2021, arXiv:2104.09864, eq. 34. Interleaved pairs, as Wan has them; not the halves (i, i + D/2) of
GPT-NeoX.
"""

import torch
from torch import Tensor

from lightx2v_kernels.registry import Op
from lightx2v_kernels.rope.reference import rope


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Contiguous heads, and the q of a fused projection (strided)."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 33, 3, 2, head_dim, generator=generator).to(device, dtype)
    angles = 10 * torch.rand(33, head_dim // 2, generator=generator)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    return (qkv[:, :, 0].contiguous(), cos, sin), (qkv[:, :, 1], cos, sin)


OPS = (Op("rope", rope, examples),)
