"""attention(q, k, v) -> out: dense, unmasked softmax(q kᵀ / sqrt(D)) v, per head.

q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D) in the dtype of q. Inputs may be strided (a slice of a fused
projection) and are never written to; the last dimension is contiguous. Source: Vaswani et al. 2017, arXiv:1706.03762,
eq. 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.attention.reference import attention, attention_plain
from lightx2v_kernels.norm_rope.reference import norm_rope
from lightx2v_kernels.registry import Backend, Op, select
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


def turned(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `Kernels.rotary_attention` -> those of attention."""
    return norm_rope(q, norm_q, cos, sin, eps), norm_rope(k, norm_k, cos, sin, eps), v


def rotary_arguments(device: torch.device, dtype: torch.dtype, tokens: int, heads: int, dim: int) -> tuple[Any, ...]:
    """q, k (1, L, H·D), v (1, L, H, D), both norms over all channels, cos, sin, eps."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = (random(1, tokens, heads * dim).to(dtype) for _ in range(3))
    norms = (1 + 0.2 * random(2, heads * dim)).to(dtype).unbind(0)
    angles = 10 * random(tokens, dim // 2)
    return (q, k, v.unflatten(2, (heads, dim)), *norms, angles.cos(), angles.sin(), 1e-6)


def rotary_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Norms over all channels, then over each head; a length no tile divides; queries that make the softmax peaky."""
    q, k, v, norm_q, norm_k, *others = rotary_arguments(device, dtype, 77, 2, head_dim)
    own = norm_q[:head_dim], norm_k[:head_dim]
    return (q, k, v, 1.5 * norm_q, norm_k, *others), (q, k, v, *own, *others)


# Held against by what a backend has of its own for `Kernels.rotary_attention`.
ROTARY = {
    "attention": Op(
        "rotary_attention",
        lambda *args: attention(*turned(*args)),
        rotary_examples,
        plain=lambda *args: attention_plain(*turned(*args)),
    )
}


def _rotary(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor]:
    """Self-attention as a model calls it, of its projections."""
    if backend.rotary:
        return backend.rotary()
    attend, turn = backend.load(), select("norm_rope", "auto", device, dtype, head_dim).load()

    def composed(q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, *rest: Any) -> Tensor:
        return attend(turn(q, norm_q, *rest), turn(k, norm_k, *rest), v)

    return composed


def _to_text(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(
        torch.randn(1, length, HEADS, head_dim, generator=generator, device=device, dtype=dtype)
        for length in (TOKENS, 512, 512)
    )


# 1.1 TFLOP of self-attention, 2 ms of an H100. Half of a 480p clip of 81 frames, so that what a kernel spends once a
# token (quantising, say) weighs about as much as it will. "cross" is attention to umT5's 512 tokens.
TOKENS, HEADS = 16384, 8
WORKLOADS = {
    "attention": {
        "self": Workload(
            lambda device, dtype, head_dim: rotary_arguments(device, dtype, TOKENS, HEADS, head_dim),
            rows=lambda x: x[:, ::256],
            inner=turned,
            function=_rotary,
        ),
        "cross": Workload(_to_text, rows=lambda x: x[:, ::256]),
    }
}

_SPARSE = "a sparse attention, which leaves out keys; here every key is computed; the nearest is '{}'"
_HARDWARE = "for hardware that this version does not run on; the nearest is '{}'"
_PARALLEL = "a way to spread attention over several GPUs: name it to enable_parallel, and here what each GPU runs, '{}'"
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
