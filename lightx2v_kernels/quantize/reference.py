"""One symmetric scale a token, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.quantized import LARGEST, SMALLEST_AMAX, Quantized
from lightx2v_kernels.registry import Backend


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x (..., K) -> values (..., K) in `dtype`, int8 or float8_e4m3fn, and scale (..., 1) fp32."""
    if dtype not in LARGEST:
        raise ValueError(f"tokens are quantised to {' or '.join(map(str, LARGEST))}, got {dtype}")
    x, largest = widen(x.detach()), LARGEST[dtype]
    amax = x.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(amax, largest) / amax  # `largest / amax` multiplies by a rounded reciprocal
    scaled = (x * torch.where(amax >= SMALLEST_AMAX, inverse, 0)).clamp(-largest, largest)
    values = scaled.round() if dtype == torch.int8 else scaled
    return Quantized(values.to(dtype), (amax / largest).float())


def gelu_quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x (..., K) -> gelu(x) in 8 bits, tanh form."""
    return quantize(F.gelu(widen(x), approximate="tanh"), dtype)


BACKENDS = (
    Backend("quantize", "reference", lambda: quantize, rank=1000, dtypes=FLOATS),
    Backend("gelu_quantize", "reference", lambda: gelu_quantize, rank=1000, dtypes=FLOATS),
)
