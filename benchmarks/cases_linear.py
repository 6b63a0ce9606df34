"""Packed linear layers at a model's sizes: up and down projection of the feed-forward, which are the longest."""

from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.ggml import TYPES, quantise_q8_0, restore
from lightx2v_kernels.linear import SCALES_AT
from lightx2v_kernels.microscaled import quantise_mxfp8, quantise_nvfp4, tiled, unit_of
from lightx2v_kernels.quantize.reference import quantize

PACKED = {"int8_linear": torch.int8, "fp8_linear": torch.float8_e4m3fn}
MICROSCALED = ("nvfp4_linear", "mxfp8_linear")


def rows_of(weight: Tensor, packed: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> in 8 bits, and its scales (N,)."""
    found = quantize(weight, packed)
    return found.values, found.scale.flatten()


def scaled(
    packed: torch.dtype, tokens: int, rows: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of `int8_linear` or `fp8_linear`."""
    x = quantize(torch.randn(tokens, size, device=device), packed)
    weight, weight_scale = rows_of(torch.randn(rows, size, device=device) / size**0.5, packed)
    return x.values, x.scale, weight, weight_scale, torch.randn(rows, device=device, dtype=dtype), dtype


def gguf(tokens: int, rows: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `gguf_linear`, with a weight in Q8_0."""
    weight = torch.randn(rows, size, device=device) / size**0.5
    x, bias = torch.randn(tokens, size, device=device, dtype=dtype), torch.randn(rows, device=device, dtype=dtype)
    return x, quantise_q8_0(weight), "Q8_0", (rows, size), bias


def microscaled(
    op: str, tokens: int, rows: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of `nvfp4_linear` or `mxfp8_linear`."""
    weight = torch.randn(rows, size, device=device) / size**0.5
    x, bias = torch.randn(tokens, size, device=device, dtype=dtype), torch.randn(rows, device=device, dtype=dtype)
    if op == "mxfp8_linear":
        values, scales = quantise_mxfp8(weight)
        return x, values, tiled(scales), bias
    unit = unit_of(weight.abs().amax())
    codes, scales = quantise_nvfp4(weight, unit, True)
    return x, codes, tiled(scales), unit, True, bias


def flops(args: tuple[Any, ...]) -> float:
    """Multiply-adds counted twice."""
    rows = args[3][0] if isinstance(args[3], tuple) else args[1 if args[1].dtype == torch.uint8 else 2].shape[0]
    return 2.0 * args[0].numel() * rows


def blocks_of(encoding: str, rows: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random blocks of a weight (rows, size) in one of GGML's types, and the values that they stand for, float32."""
    block_bytes, _ = TYPES[encoding]
    count = rows * size // (32 if block_bytes <= 34 else 256)
    generator = torch.Generator(device).manual_seed(0)
    blocks = torch.randint(0, 256, (count, block_bytes), dtype=torch.uint8, generator=generator, device=device)
    small = torch.tensor([1e-3], dtype=torch.float16).view(torch.uint8).to(device)
    for at in SCALES_AT[encoding]:
        blocks[:, at : at + 2] = small
    return blocks.flatten(), restore(blocks.flatten(), encoding, (rows, size))
