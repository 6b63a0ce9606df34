"""Packed linear layers by restoring everything and multiplying in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.ggml import restore
from lightx2v_kernels.microscaled import restore_mxfp8, restore_nvfp4
from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def scaled_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """values (..., K) and weight (N, K) in 8 bits, scale (..., 1) and weight_scale (N,) fp32 -> (..., N) in dtype."""
    y = F.linear(widen(values) * scale, widen(weight) * weight_scale[:, None], None if bias is None else widen(bias))
    return y if values.dtype == torch.float64 else y.to(dtype)


def plain_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same at the dtype of the result: what a model computes whose weights were restored."""
    x, restored = (values.float() * scale).to(dtype), (weight.float() * weight_scale[:, None]).to(dtype)
    return F.linear(x, restored, None if bias is None else bias.to(dtype))


def gguf_linear(x: Tensor, blocks: Tensor, encoding: str, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """x (..., K), blocks (bytes,) uint8 of a weight (N, K) -> (..., N) in the dtype of x."""
    raw = blocks.to(torch.uint8)  # a self-test widens every tensor it is given
    return _restored_linear(x, restore(raw, encoding, shape), bias)


def nvfp4_linear(
    x: Tensor, codes: Tensor, scales: Tensor, unit: Tensor, high_first: bool, bias: Tensor | None
) -> Tensor:
    """x (..., K), codes (N, K / 2) uint8, scales in tiles uint8, unit (1,) -> (..., N) in the dtype of x."""
    return _restored_linear(x, restore_nvfp4(codes.to(torch.uint8), scales.to(torch.uint8), unit, high_first), bias)


def mxfp8_linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), values (N, K) e4m3 as uint8, scales in tiles uint8 -> (..., N) in the dtype of x."""
    return _restored_linear(x, restore_mxfp8(values.to(torch.uint8), scales.to(torch.uint8)), bias)


def _restored_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = widen(x)
    return F.linear(wide, weight.to(wide.dtype), None if bias is None else widen(bias)).to(x.dtype)


BACKENDS = (
    *(
        Backend(op, "reference", lambda: scaled_linear, rank=1000, dtypes=FLOATS)
        for op in ("int8_linear", "fp8_linear")
    ),
    Backend("gguf_linear", "reference", lambda: gguf_linear, rank=1000, dtypes=FLOATS),
    Backend("nvfp4_linear", "reference", lambda: nvfp4_linear, rank=1000, dtypes=FLOATS),
    Backend("mxfp8_linear", "reference", lambda: mxfp8_linear, rank=1000, dtypes=FLOATS),
)
