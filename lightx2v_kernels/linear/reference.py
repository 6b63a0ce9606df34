"""Packed linear layers by restoring everything and multiplying in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.ggml import restore
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
    y = F.linear(widen(x), restore(raw, encoding, shape).to(widen(x).dtype), None if bias is None else widen(bias))
    return y.to(x.dtype)


BACKENDS = (
    *(
        Backend(op, "reference", lambda: scaled_linear, rank=1000, dtypes=FLOATS)
        for op in ("int8_linear", "fp8_linear")
    ),
    Backend("gguf_linear", "reference", lambda: gguf_linear, rank=1000, dtypes=FLOATS),
)
