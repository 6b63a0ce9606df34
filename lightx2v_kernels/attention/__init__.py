"""attention(q, k, v) -> out: dense, unmasked softmax(q kᵀ / sqrt(D)) v, per head.

q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D) in the dtype of q. Inputs may be strided (a slice of a fused
projection) and are never written to; the last dimension is contiguous. Source: Vaswani et al. 2017, arXiv:1706.03762,
eq. 1.
"""

import torch
from torch import Tensor

from lightx2v_kernels.attention.reference import attention, attention_plain
from lightx2v_kernels.registry import Op
from lightx2v_kernels.timings import Workload


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Self-attention from one fused projection, at a length no tile divides; cross-attention to a short context."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 77, 3, 2, head_dim, generator=generator)
    key, value = torch.randn(2, 1, 33, 2, head_dim, generator=generator).to(device, dtype).unbind(0)
    # Scores with a spread of 2 make the softmax peaky: a wrong scale or a dropped key shows.
    qkv[:, :, 0] *= 2
    q, k, v = qkv.to(device, dtype).unbind(2)
    return (q, k, v), (q.contiguous(), key, value)


OPS = (Op("attention", attention, examples, plain=attention_plain),)


def _workload(keys: int | None) -> Workload:
    """16384 tokens in 8 heads: 1.1 TFLOP of self-attention, 2 ms of an H100. Half of a 480p clip of 81 frames, so that
    what a kernel spends once a token (quantising, say) weighs about as much as it will."""

    def arguments(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        lengths = (16384, keys or 16384, keys or 16384)
        return tuple(
            torch.randn(1, length, 8, head_dim, generator=generator, device=device, dtype=dtype) for length in lengths
        )

    return Workload(arguments, rows=lambda x: x[:, ::256])


# "cross" is attention to umT5's 512 tokens.
WORKLOADS = {"attention": {"self": _workload(None), "cross": _workload(512)}}

_SPARSE = "a sparse attention, which leaves out keys; here every key is computed; the nearest is '{}'"
_HARDWARE = "for hardware that this version does not run on; the nearest is '{}'"
_PARALLEL = "a way to spread one attention over several GPUs, which this version does not do; the nearest is '{}'"
_OTHER = "{}"
# LightX2V's registered attention names (lightx2v/common/ops/attn, lightx2v_platform), and stale ones of its config
# files: why not -> name -> the nearest that is here. A name that is here too has no line.
_NEAREST = {
    _SPARSE: {
        **dict.fromkeys(
            "radial_attn sparge_attn svg_attn svg2_attn nbhd_attn nbhd_attn_flashinfer draft_attn dynamic_sparse_attn "
            "rainfusion_attn sol_attn general_sparse_attn swiftvr_mfswa".split(),
            "auto",
        ),
        **{"spas_sage_attn": "sage_attn2", "spas_sage_attn2": "sage_attn2", "spas_sage_attn3": "sage_attn3"},
        "spas_flash_attn4": "flash_attn4",
    },
    _HARDWARE: {
        **dict.fromkeys(
            "aiter_attn npu_flash_attn mlu_flash_attn intel_xpu_flash_attn intel_xpu_cute_attn iluvatar_flash_attn "
            "flash_attn_hygon_dcu flash_attn_enflame_gcu".split(),
            "torch_sdpa",
        ),
        **dict.fromkeys(("mlu_sage_attn", "metax_sage_attn2"), "auto"),
    },
    _PARALLEL: dict.fromkeys(("ulysses", "ulysses-4090", "ring"), "auto"),
    _OTHER: {
        "sage_attn2_k_int8_v_fp8": "its kernels are those of 'sage_attn2'; use that",
        "flex_attn": "without a mask it computes what 'torch_sdpa' computes; use that",
        **dict.fromkeys(("dreamzero_fa2", "dreamzero_cross_fa"), "of a model that is not here; use 'flash_attn2'"),
    },
}
ELSEWHERE = {
    "attention": {name: why.format(nearest) for why, names in _NEAREST.items() for name, nearest in names.items()}
}
