"""PyTorch's own fp8 product (cuBLAS and CUTLASS), a scale a row of each side.

Two of them. Adding up in the tensor core's own registers keeps some 14 bits of a sum (DeepSeek-V3, arXiv:2412.19437,
section 3.3.2). What that loses is far below what rounding both sides to e4m3 lost before (2.6 % each), and at
Wan's sizes it runs at 1329, 1300, 1173 and 1265 TFLOP/s instead of 1035, 1028, 951 and 977 (H100, 32760 tokens). So
that one is tried first, and its self-test, over 4096 values, says whether a GPU loses more.

NVFP4 and MXFP8 on Blackwell: tokens get block scales of their own, a unit too for NVFP4, anew in each call and rounded
to the nearest, and tensor cores multiply both sides. That rounds tokens to 4 bits (9.5 % of them) or 8 (2.6 %), which
the formula of these ops does not: so both run when they are named. They have never run; what is known is that
PyTorch's own checks of sizes and types take these arguments. Triton rounds the tokens in one pass where it is
installed, PyTorch's own steps elsewhere, to the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightx2v_kernels.machine import importable
from lightx2v_kernels.microscaled import quantise_mxfp8, quantise_nvfp4, tiled, unit_of
from lightx2v_kernels.registry import Backend

CHUNK = 4096  # tokens put into blocks at once, whole tiles of scales: their float32 copies take 226 MB at 13824 values


def fp8_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fast: bool,
) -> Tensor:
    """values (..., K), scale (..., 1), weight (N, K), weight_scale (N,) -> (..., N). fast: see above."""
    y = torch._scaled_mm(
        values.reshape(-1, values.shape[-1]),
        weight.t(),
        scale_a=scale.reshape(-1, 1).contiguous(),
        scale_b=weight_scale[None, :],
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return y.view(*values.shape[:-1], weight.shape[0])


@dataclass(frozen=True)
class Rounding:
    """How tokens (M, K) are put into blocks. nvfp4: (x, unit, high_first), mxfp8: (x) -> codes and scales in tiles.

    at_once: tokens, whole tiles of scales.
    """

    nvfp4: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    mxfp8: Callable[[Tensor], tuple[Tensor, Tensor]]
    at_once: int


def in_steps() -> Rounding:
    """In PyTorch's own steps, of which there are many: a few tokens at a time, for their copies in float32."""

    def nvfp4(x: Tensor, unit: Tensor, high_first: bool) -> tuple[Tensor, Tensor]:
        codes, scales = quantise_nvfp4(x, unit, high_first)
        return codes, tiled(scales)

    def mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = quantise_mxfp8(x)
        return values, tiled(scales)

    return Rounding(nvfp4, mxfp8, CHUNK)


def in_one_pass() -> Rounding:
    """By Triton, to the same bits."""
    from lightx2v_kernels.linear._triton_microscale import mxfp8_tokens, nvfp4_tokens

    return Rounding(nvfp4_tokens, mxfp8_tokens, 1 << 30)


def nvfp4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    unit: Tensor,
    high_first: bool,
    bias: Tensor | None,
    *,
    rounding: Rounding,
) -> Tensor:
    """x (..., K), codes (N, K / 2) uint8, scales in tiles uint8, unit (1,) -> (..., N)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    least, largest = flat.aminmax()
    own = unit_of(torch.maximum(-least, largest).float())

    def product(tokens: Tensor) -> Tensor:
        values, by_block = rounding.nvfp4(tokens, own, high_first)  # both sides in one order: sums are the same
        pairs = torch.float4_e2m1fn_x2
        sides = (values.view(pairs), codes.view(pairs).t())
        y = _block_scaled(*sides, by_block, scales, torch.float8_e4m3fn, x.dtype) * (own * unit)
        return y if bias is None else y + bias

    return _in_pieces(product, flat, codes.shape[0], rounding.at_once).view(*x.shape[:-1], codes.shape[0])


def mxfp8_linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, *, rounding: Rounding) -> Tensor:
    """x (..., K), values (N, K) e4m3 as uint8, scales in tiles uint8 -> (..., N)."""

    def product(tokens: Tensor) -> Tensor:
        own, by_block = rounding.mxfp8(tokens)
        sides = (own.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn).t())
        y = _block_scaled(*sides, by_block, scales, torch.float8_e8m0fnu, x.dtype)
        return y if bias is None else y + bias

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return _in_pieces(product, flat, values.shape[0], rounding.at_once).view(*x.shape[:-1], values.shape[0])


def _block_scaled(
    first: Tensor, second: Tensor, first_scale: Tensor, second_scale: Tensor, scales: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """first (M, K) . second (K, N), each with a scale for each block along K, in tiles; scales: their type."""
    scale_a, scale_b = (scale.flatten().view(scales) for scale in (first_scale, second_scale))
    return torch._scaled_mm(first, second, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


def _in_pieces(product: Callable[[Tensor], Tensor], flat: Tensor, rows: int, at_once: int) -> Tensor:
    if len(flat) <= at_once:
        return product(flat).to(flat.dtype)
    out = torch.empty(len(flat), rows, dtype=flat.dtype, device=flat.device)
    for start in range(0, len(flat), at_once):
        some = slice(start, start + at_once)
        out[some] = product(flat[some])
    return out


def _load(fast: bool) -> Callable[..., Tensor]:
    return partial(fp8_linear, fast=fast)


# Its scales a row are only known for bfloat16 results (PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp).
FP8 = tuple(
    Backend(
        "fp8_linear",
        name,
        partial(_load, fast),
        rank=rank,
        devices=frozenset({"cuda"}),
        min_sm=(8, 9),
        dtypes=frozenset({torch.bfloat16}),
    )
    for name, fast, rank in (("torch_scaled_mm", True, 100), ("torch_scaled_mm_exact", False, 300))
)


def _load_rounding(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(linear, rounding=in_one_pass() if importable("triton") else in_steps())


# max_error: tokens of a normal distribution are rounded by 9.5 % (NVFP4) and 2.6 % (MXFP8); with room.
BACKENDS = (
    *FP8,
    *(
        Backend(
            op,
            "torch_scaled_mm",
            partial(_load_rounding, linear),
            rank=100,
            devices=frozenset({"cuda"}),
            min_sm=(10, 0),
            dtypes=frozenset({torch.bfloat16}),
            max_error=error,
        )
        for op, linear, error in (
            ("nvfp4_linear", nvfp4_linear, 0.13),
            ("mxfp8_linear", mxfp8_linear, 0.04),
        )
    ),
)
