"""NVFP4 and MXFP8 in Triton: a weight is restored to a scratch tensor and cuBLAS multiplies, as for GGML's blocks.

Codes and scales are taken apart as integers, so that GPUs without these types run it too. A program restores a piece of
one row. Layouts: `lightx2v_kernels/microscaled.py`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.opaque import opaque

VALUES = 1024  # restored by one program, at most


@triton.jit
def _e4m3(code):
    """A byte, int32 -> float32: 2^(e - 7) * (1 + m / 8), 2^-9 * m where e is 0."""
    size = code & 127
    bits = (size << 20) + (120 << 23)
    y = tl.where(size < 8, (code & 7).to(tl.float32) * 0.001953125, bits.to(tl.float32, bitcast=True))
    y = tl.where(size == 127, float("nan"), y)
    return tl.where(code > 127, -y, y)


@triton.jit
def _e2m1(code):
    """Four bits, int32 -> float32."""
    size = code & 7
    bits = (size << 22) + (126 << 23)
    y = tl.where(size < 2, size.to(tl.float32) * 0.5, bits.to(tl.float32, bitcast=True))
    return tl.where(code > 7, -y, y)


@triton.jit
def _scale(scales, row, block, WIDTH, inside):
    """The byte of a block's scale, int32. WIDTH: tiles along a row."""
    at = (row // 128 * WIDTH + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    return tl.load(scales + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _restore_nvfp4(codes, scales, unit, out, K, WIDTH, HIGH_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)  # of bytes
    inside = at < K // 2
    byte = tl.load(codes + row * (K // 2) + at, mask=inside, other=0).to(tl.int32)
    scale = _e4m3(_scale(scales, row, at // 8, WIDTH, inside)) * tl.load(unit)
    upper, lower = _e2m1(byte >> 4) * scale, _e2m1(byte & 15) * scale
    values = tl.interleave(upper, lower) if HIGH_FIRST else tl.interleave(lower, upper)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * K + j, values.to(out.dtype.element_ty), mask=j < K)


@triton.jit
def _restore_mxfp8(values, scales, out, K, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < K
    value = _e4m3(tl.load(values + row * K + j, mask=inside, other=0).to(tl.int32))
    exponent = _scale(scales, row, j // 32, WIDTH, inside)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 has no exponent of its own in float32
    scale = tl.where(exponent == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    tl.store(out + row * K + j, (value * scale).to(out.dtype.element_ty), mask=inside)


def restored_nvfp4(codes: Tensor, scales: Tensor, unit: Tensor, high_first: bool, dtype: torch.dtype) -> Tensor:
    """codes (N, K / 2), scales in tiles, both uint8, unit (1,) float32 -> (N, K) in dtype."""
    rows, size = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, size, dtype=dtype, device=codes.device)
    block = min(VALUES, triton.next_power_of_2(size))
    grid = (rows, triton.cdiv(size, block))
    _restore_nvfp4[grid](codes, scales, unit, out, size, -(-size // 64), high_first, block, num_warps=4)
    return out


def restored_mxfp8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values (N, K) e4m3, scales in tiles, both uint8 -> (N, K) in dtype."""
    rows, size = values.shape
    out = torch.empty(rows, size, dtype=dtype, device=values.device)
    block = min(VALUES, triton.next_power_of_2(size))
    grid = (rows, triton.cdiv(size, block))
    _restore_mxfp8[grid](values, scales, out, size, -(-size // 128), block, num_warps=4)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return F.linear(flat, weight, None if bias is None else bias.to(x.dtype)).view(*x.shape[:-1], weight.shape[0])


def _nvfp4(x: Tensor, codes: Tensor, scales: Tensor, unit: Tensor, high_first: bool, bias: Tensor | None) -> Tensor:
    """See the contract."""
    return _linear(x, restored_nvfp4(codes, scales, unit, high_first, x.dtype), bias)


def _mxfp8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See the contract."""
    return _linear(x, restored_mxfp8(values, scales, x.dtype), bias)


def _fake_nvfp4(
    x: Tensor, codes: Tensor, scales: Tensor, unit: Tensor, high_first: bool, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_mxfp8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


nvfp4_linear = opaque("nvfp4_linear", _nvfp4, _fake_nvfp4)
mxfp8_linear = opaque("mxfp8_linear", _mxfp8, _fake_mxfp8)
