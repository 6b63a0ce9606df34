"""Rows to 8 bits, one program a few whole rows: the row stays in registers between its maximum and its rounding."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels import tiles
from lightx2v_kernels.opaque import opaque
from lightx2v_kernels.quantized import LARGEST, SMALLEST_AMAX, Quantized

NONE, INT8, FP8, FP8_BITS = range(4)
_SMALLEST = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def encode(x, KIND: tl.constexpr):
    """x fp32 within the range of the type -> its 8 bits, rounded to nearest even."""
    if KIND == 1:
        # Added to 1.5 * 2^23 a float has its integer, rounded to even, in its low bits: two's complement.
        encoded = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif KIND == 2:
        encoded = x.to(tl.float8e4nv)
    else:
        # GPUs before sm_89 have no fp8. 2^-120 makes the exponent's bias 7 out of 127, so that also the subnormal
        # values line up; 20 of 23 bits of mantissa are then rounded away.
        bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        encoded = (bits | (x.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
    return encoded


@triton.jit
def gelu(x):
    """The tanh form: tanh(z) = 2 / (1 + e^(-2 z)) - 1, so that gelu(x) = x / (1 + 2^w), where
    w = -2 log2(e) z = -2 log2(e) sqrt(2 / pi) (x + 0.044715 x^3).

    The quotient as a squared inverse root: one instruction where a division is eight.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198144325 - 0.10294323957999349 * (x * x))))
    return x * (root * root)


@triton.jit
def quantize_rows(x, LIMIT: tl.constexpr, KIND: tl.constexpr):
    """x (R, K) fp32 -> its 8 bits (R, K), scale (R,)."""
    # As integers, magnitudes have the same order and NaN is above inf: the maximum of floats would leave a NaN out.
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    inverse = tl.where(amax >= _SMALLEST, tl.div_rn(LIMIT, tl.where(amax >= _SMALLEST, amax, 1.0)), 0.0)
    return encode(x * inverse[:, None], KIND), tl.div_rn(amax, LIMIT)


@triton.jit
def store_bits(row_start, column, bits, mask):
    """bits (R, K) to rows that start at the pointers row_start (R, 1).

    By 8 a thread. One store could take 16, and the compiler would then lay out every tensor of the kernel so, which
    leaves a sixth of the threads without work where a row has 5 * 1024 values: it is not to see that one run of 8
    follows on the other.
    """
    column = column // 8 * 8 + column % 8
    tl.store(row_start + column[None, :], bits, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    x,
    out,
    scale,
    rows,
    stride,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    value = value.to(tl.float32)
    if GELU:
        value = gelu(value)
    bits, scales = quantize_rows(value, LIMIT, KIND)
    store_bits(out + row[:, None] * WIDTH, column, bits, mask)
    tl.store(scale + row, scales, mask=row < rows)


def kind(dtype: torch.dtype, device: torch.device) -> int:
    """How a kernel writes `dtype` on that device. Raises ValueError for a type that tokens are not quantised to."""
    if dtype not in LARGEST:
        raise ValueError(f"tokens are quantised to {' or '.join(map(str, LARGEST))}, got {dtype}")
    return INT8 if dtype == torch.int8 else FP8 if _has_fp8(device) else FP8_BITS


def empty_quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values and scale for x (..., K), unwritten."""
    values = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return values, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def writable(values: Tensor, how: int) -> Tensor:
    """The tensor that a kernel of that kind stores into."""
    return values.view(torch.uint8) if how == FP8_BITS else values


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _launch(x: Tensor, dtype: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    values, scale = empty_quantized(x, dtype)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    tile = tiles.whole_rows(flat.shape[1])
    how = kind(dtype, x.device)
    if flat.shape[0]:
        _quantize[(tiles.count(flat.shape[0], tile.rows),)](
            flat,
            writable(values, how),
            scale,
            flat.shape[0],
            flat.stride(0),
            WIDTH=flat.shape[1],
            GELU=gelu,
            LIMIT=LARGEST[dtype],
            KIND=how,
            ROWS=tile.rows,
            BLOCK=tiles.power_of_two(flat.shape[1]),
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return values, scale


def _quantize_op(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _launch(x, dtype, gelu=False)


def _gelu_quantize_op(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _launch(x, dtype, gelu=True)


_quantized = opaque("quantize", _quantize_op, empty_quantized)
_gelu_quantized = opaque("gelu_quantize", _gelu_quantize_op, empty_quantized)


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x (..., K) -> values (..., K) in `dtype`, int8 or float8_e4m3fn, and scale (..., 1) fp32."""
    return Quantized(*_quantized(x.detach(), dtype))


def gelu_quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x (..., K) -> gelu(x) in 8 bits, tanh form."""
    return Quantized(*_gelu_quantized(x.detach(), dtype))
