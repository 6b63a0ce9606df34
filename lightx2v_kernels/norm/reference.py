"""Root-mean-square and layer normalisation through PyTorch's own functions, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.quantize.reference import quantize
from lightx2v_kernels.quantized import Quantized
from lightx2v_kernels.registry import Backend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in the dtype of x."""
    return F.rms_norm(widen(x), weight.shape, widen(weight), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight and bias (D,) or None -> (..., D) in the dtype of x."""
    weight, bias = (None if p is None else widen(p) for p in (weight, bias))
    return F.layer_norm(widen(x), x.shape[-1:], weight, bias, eps).to(x.dtype)


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Quantized:
    """x (..., D), weight and bias (D,) or None -> the normed tokens in 8 bits."""
    return quantize(layer_norm(widen(x), weight, bias, eps), dtype)


BACKENDS = (
    Backend("rms_norm", "reference", lambda: rms_norm, rank=1000, dtypes=FLOATS),
    Backend("layer_norm", "reference", lambda: layer_norm, rank=1000, dtypes=FLOATS),
    Backend("layer_norm_quantize", "reference", lambda: layer_norm_quantize, rank=1000, dtypes=FLOATS),
)
