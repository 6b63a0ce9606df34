"""adaLN modulation and the gated residual, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.norm.reference import layer_norm
from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.quantize.reference import quantize
from lightx2v_kernels.quantized import Quantized
from lightx2v_kernels.registry import Backend


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (B, L, D), shift and scale (B, 1 | L, D) fp32 -> (B, L, D) in the dtype of x."""
    normed = F.layer_norm(widen(x), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x and y (B, L, D), gate (B, 1 | L, D) fp32 -> (B, L, D) in the dtype of x."""
    return torch.addcmul(widen(x), widen(y), gate).to(x.dtype)


def residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x and y (B, L, D), gate, shift and scale (B, 1 | L, D) fp32 -> x + y * gate, and that modulated."""
    x = residual(x, y, gate)
    return x, modulate(x, shift, scale, eps)


def residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x and y (B, L, D), gate (B, 1 | L, D) fp32, weight and bias (D,) -> x + y * gate, and that normed."""
    x = residual(x, y, gate)
    return x, layer_norm(x, weight, bias, eps)


def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Quantized:
    """As modulate, into 8 bits."""
    return quantize(modulate(widen(x), shift, scale, eps), dtype)


def residual_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Quantized]:
    """As residual_modulate, the modulated tokens into 8 bits."""
    x = residual(x, y, gate)
    return x, modulate_quantize(x, shift, scale, eps, dtype)


def residual_layer_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Quantized]:
    """As residual_layer_norm, the normed tokens into 8 bits."""
    x = residual(x, y, gate)
    return x, quantize(layer_norm(widen(x), weight, bias, eps), dtype)


def residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y * gate; without a gate one addition, which rounds once at any dtype."""
    return x + y if gate is None else gated_residual(x, y, gate)


BACKENDS = (
    Backend("modulate", "reference", lambda: modulate, 1000, dtypes=FLOATS),
    Backend("gated_residual", "reference", lambda: gated_residual, 1000, dtypes=FLOATS),
    Backend("residual_modulate", "reference", lambda: residual_modulate, 1000, dtypes=FLOATS),
    Backend("residual_layer_norm", "reference", lambda: residual_layer_norm, 1000, dtypes=FLOATS),
    Backend("modulate_quantize", "reference", lambda: modulate_quantize, 1000, dtypes=FLOATS),
    Backend("residual_modulate_quantize", "reference", lambda: residual_modulate_quantize, 1000, dtypes=FLOATS),
    Backend("residual_layer_norm_quantize", "reference", lambda: residual_layer_norm_quantize, 1000, dtypes=FLOATS),
)
