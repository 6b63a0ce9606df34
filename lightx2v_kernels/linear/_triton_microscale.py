"""Tokens into NVFP4 and MXFP8 in one pass, for tensor cores that multiply in these formats.

A program takes a piece of one row. Layouts and rounding: `lightx2v_kernels/microscaled.py`. Codes are put together as
integers, as `_triton_microscaled.py` takes them apart: Triton's own conversions differ from GPU to GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.linear._triton_microscaled import _e4m3
from lightx2v_kernels.microscaled import MXFP8_BLOCK, NVFP4_BLOCK, scale_shape
from lightx2v_kernels.opaque import opaque

BLOCKS = 32  # of values, taken by one program
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off, it leaves the nearest whole number, ties to even


@triton.jit
def _nearest(x):
    return (x + ROUND) - ROUND


@triton.jit
def _code(x):
    """The nearest e2m1 code, int32: see `microscaled._e2m1`."""
    size = tl.minimum(tl.abs(x), 6.0)
    coarse = tl.where(size < 4, _nearest(size) + 2, _nearest(size * 0.5) + 4)
    code = tl.minimum(tl.where(size < 2, _nearest(size * 2), coarse), 7.0)
    return code.to(tl.int32) | tl.where(x < 0, 8, 0)


@triton.jit
def _to_e4m3(x):
    """The nearest e4m3 code of 0 to 448, ties to even, int32: steps of 2^(e - 3), and none below 2^-9."""
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 121)
    steps = _nearest(x * ((257 - exponent) << 23).to(tl.float32, bitcast=True))
    return steps.to(tl.int32) + (exponent - 121) * 8


@triton.jit
def _place(row, block, WIDTH):
    return (row // 128 * WIDTH + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@triton.jit
def _to_nvfp4(x, unit, codes, scales, K, WIDTH, HIGH_FIRST: tl.constexpr, COUNT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    inside = block < K // 16
    byte = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    even = tl.load(x + row * K + byte * 2, mask=inside[:, None], other=0.0).to(tl.float32)
    odd = tl.load(x + row * K + byte * 2 + 1, mask=inside[:, None], other=0.0).to(tl.float32)
    whole = tl.load(unit)
    wanted = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1) / 6.0
    scale = tl.minimum(tl.where(whole > 0, wanted / tl.where(whole > 0, whole, 1.0), 0.0), 448.0)
    code = _to_e4m3(scale)
    exact = (_e4m3(code) * whole)[:, None]
    safe = tl.where(exact > 0, exact, 1.0)
    first, second = _code(tl.where(exact > 0, even / safe, 0.0)), _code(tl.where(exact > 0, odd / safe, 0.0))
    packed = first * 16 + second if HIGH_FIRST else second * 16 + first
    tl.store(codes + row * (K // 2) + byte, packed.to(tl.uint8), mask=inside[:, None])
    tl.store(scales + _place(row, block, WIDTH), code.to(tl.uint8), mask=inside)


@triton.jit
def _to_mxfp8(x, values, scales, K, WIDTH, COUNT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    inside = block < K // 32
    at = row * K + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tokens = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    number = tokens == tokens
    bits = (tl.max(tl.where(number, tl.abs(tokens), 0.0), 1) / 448.0).to(tl.int32, bitcast=True)
    part = bits & 0x7FFFFF
    above = tl.where(bits >> 23 == 0, part > 0x400000, part > 0)  # no power of two itself: the next one
    exponent = (bits >> 23) + above.to(tl.int32)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    found = _to_e4m3(tl.where(number, tl.abs(tokens), 0.0) * inverse) | tl.where(tokens < 0, 128, 0)
    found = tl.where(number, found, 127)  # NaN, so that it is seen in the result
    tl.store(values + at, found.to(tl.uint8), mask=inside[:, None])
    tl.store(scales + _place(row, block, WIDTH), exponent.to(tl.uint8), mask=inside)


def _nvfp4(x: Tensor, unit: Tensor, high_first: bool) -> tuple[Tensor, Tensor]:
    """x (M, K) contiguous, unit (1,) float32 -> codes (M, K / 2), scales in tiles, both uint8."""
    rows, size = x.shape
    codes = torch.empty(rows, size // 2, dtype=torch.uint8, device=x.device)
    scales = torch.zeros(scale_shape(rows, size // NVFP4_BLOCK), dtype=torch.uint8, device=x.device)
    grid = (rows, triton.cdiv(size // NVFP4_BLOCK, BLOCKS))
    _to_nvfp4[grid](x, unit, codes, scales, size, scales.shape[1] // 4, high_first, BLOCKS, num_warps=2)
    return codes, scales


def _mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) contiguous -> e4m3 values (M, K), scales in tiles, both uint8."""
    rows, size = x.shape
    values = torch.empty(rows, size, dtype=torch.uint8, device=x.device)
    scales = torch.zeros(scale_shape(rows, size // MXFP8_BLOCK), dtype=torch.uint8, device=x.device)
    grid = (rows, triton.cdiv(size // MXFP8_BLOCK, BLOCKS))
    _to_mxfp8[grid](x, values, scales, size, scales.shape[1] // 4, BLOCKS, num_warps=2)
    return values, scales


def _fake_nvfp4(x: Tensor, unit: Tensor, high_first: bool) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    scales = x.new_empty(scale_shape(rows, size // NVFP4_BLOCK), dtype=torch.uint8)
    return x.new_empty(rows, size // 2, dtype=torch.uint8), scales


def _fake_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    scales = x.new_empty(scale_shape(rows, size // MXFP8_BLOCK), dtype=torch.uint8)
    return x.new_empty(rows, size, dtype=torch.uint8), scales


nvfp4_tokens = opaque("nvfp4_tokens", _nvfp4, _fake_nvfp4)
mxfp8_tokens = opaque("mxfp8_tokens", _mxfp8, _fake_mxfp8)
