"""The Triton kernels as PyTorch's own ops, opaque to torch.compile and differentiable, and the tile sizes of each GPU.

Gradients are those of exact attention at the saved inputs, through PyTorch's fused one: the score matrix of the
reference would not fit where these kernels are wanted.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import __version__ as triton_version

from lightx2v_kernels.attention import _triton, _triton_quantize
from lightx2v_kernels.attention._triton import Config, Tokens8
from lightx2v_kernels.norm.reference import rms_norm
from lightx2v_kernels.rope.reference import rope

log = logging.getLogger(__name__)

# Shared memory of a program: 227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, sm_89 and sm_120. Only Hopper's
# rows are for measuring (`python -m benchmarks.attention --tune`); the others are tiles that fit and do not spill.
EXACT = {
    (9, 0): Config(128, 128, warps=8, stages=2, tma=True),
    (10, 0): Config(128, 64, warps=8, stages=3, tma=True),
    (8, 0): Config(128, 64, warps=8, stages=3),
}
INT8 = {
    (9, 0): Config(64, 128, warps=4, stages=2, tma=True),
    (10, 0): Config(128, 64, warps=8, stages=3, tma=True),
    (8, 0): Config(128, 64, warps=8, stages=3),
}
SMALL_MEMORY = Config(128, 64, warps=8, stages=2)
INTERPRETED = Config(64, 64)


@functools.cache
def config(device: torch.device, int8: bool) -> Config:
    """The tile sizes for one GPU; those of the CPU are for Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETED
    return (INT8 if int8 else EXACT).get(torch.cuda.get_device_capability(device), SMALL_MEMORY)


@functools.cache
def hopper(device: torch.device) -> ModuleType | None:
    """The kernels in Gluon, where the GPU is a Hopper and its Triton has what they need (3.6 has)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        return importlib.import_module("lightx2v_kernels.attention._hopper")
    except (ImportError, AttributeError) as error:  # Gluon is experimental: names come and go
        log.info("attention: Triton %s lacks what the Hopper kernels need (%s); plain ones run", triton_version, error)
        return None


@torch.library.custom_op("lightx2v::attention_triton", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H, D), all bf16 or all fp16 -> (B, L, H, D)."""
    if own := hopper(q.device):
        return own.exact(q, k, v)
    return _triton.exact(q, k, v, config(q.device, int8=False))


def _from_int8(quantize: Callable[[int], Tokens8], v: Tensor) -> Tensor:
    """quantize: gives q and k in 8 bits, k with a scale for so many keys."""
    if own := hopper(v.device):
        return own.from_int8(quantize(own.INT8.keys), v)
    chosen = config(v.device, int8=True)
    return _triton.from_int8(quantize(chosen.block_n), v, chosen)


@torch.library.custom_op("lightx2v::attention_int8", mutates_args=())
def attention_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with q and k rounded to 8 bits."""
    return _from_int8(lambda block: _triton_quantize.quantize(q, k, block), v)


@torch.library.custom_op("lightx2v::rotary_attention_int8", mutates_args=())
def rotary_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """q, k (B, L, H * D), v (B, L, H, D), norms (H * D,) or (D,), cos and sin (L, D / 2) float32 -> (B, L, H, D)."""

    def quantize(block: int) -> Tokens8:
        return _triton_quantize.quantize_rotary(q, k, (norm_q, norm_k), (cos, sin), eps, v.shape[-1], block)

    return _from_int8(quantize, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _rotary(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    def heads(x: Tensor, weight: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (-1, weight.shape[0]))
        return rope(rms_norm(grouped, weight, eps).flatten(-2).unflatten(-1, (-1, v.shape[-1])), cos, sin)

    return _sdpa(heads(q, norm_q), heads(k, norm_k), v)


def _like_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=v.dtype, device=q.device)


def _like_values(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.rest = [x for x in inputs if not isinstance(x, Tensor)]


def _backward_of(forward: Any) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = forward(*leaves, *ctx.rest)
        return (*torch.autograd.grad(out, leaves, grad), *(None for _ in ctx.rest))

    return backward


for _op, _fake, _forward in (
    (attention, _like_queries, _sdpa),
    (attention_int8, _like_queries, _sdpa),
    (rotary_attention_int8, _like_values, _rotary),
):
    _op.register_fake(_fake)
    _op.register_autograd(_backward_of(_forward), setup_context=_save)
