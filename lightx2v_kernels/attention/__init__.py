"""attention(q, k, v) -> out: dense, unmasked softmax(q kᵀ / sqrt(D)) v, per head.

q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D) in the dtype of q. Inputs may be strided (a slice of a fused
projection); the last dimension is contiguous. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
"""

import torch
from torch import Tensor

from lightx2v_kernels.attention.reference import attention, attention_plain
from lightx2v_kernels.registry import Op

# LightX2V's registered attention names, and the stale ones its config files still hold (lightx2v/common/ops/attn).
UPSTREAM_DENSE = (
    "flash_attn2 flash_attn3 flash_attn4 sage_attn sage_attn2 sage_attn2_k_int8_v_fp8 sage_attn3 torch_sdpa flex_attn "
    "aiter_attn npu_flash_attn mlu_sage_attn mlu_flash_attn intel_xpu_flash_attn flash_attn_hygon_dcu "
    "flash_attn_enflame_gcu"
)
UPSTREAM_SPARSE = (
    "radial_attn sparge_attn spas_sage_attn spas_sage_attn2 spas_sage_attn3 spas_flash_attn4 svg_attn svg2_attn "
    "nbhd_attn nbhd_attn_flashinfer draft_attn dynamic_sparse_attn rainfusion_attn sol_attn general_sparse_attn"
)


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Self-attention from one fused projection, at a length no tile divides; cross-attention to a short context."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 77, 3, 2, head_dim, generator=generator)
    key, value = torch.randn(2, 1, 33, 2, head_dim, generator=generator).to(device, dtype).unbind(0)
    # Scores with a spread of 2 make the softmax peaky: a wrong scale or a dropped key shows.
    qkv[:, :, 0] *= 2
    q, k, v = qkv.to(device, dtype).unbind(2)
    return (q, k, v), (q.contiguous(), key, value)


OPS = (
    Op(
        "attention",
        attention,
        examples,
        plain=attention_plain,
        upstream=frozenset((UPSTREAM_DENSE + " " + UPSTREAM_SPARSE).split()),
    ),
)
