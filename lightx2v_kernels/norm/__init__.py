"""Normalisation over the last dimension, statistics in fp32, one rounding at the end.

rms_norm(x (..., D), weight (D,), eps) -> (..., D): x / sqrt(mean(x²) + eps) · weight.
Source: Zhang and Sennrich 2019, arXiv:1910.07467.

layer_norm(x (..., D), weight (D,) | None, bias (D,) | None, eps) -> (..., D):
(x - mean) / sqrt(var + eps) · weight + bias.
Source: Ba et al. 2016, arXiv:1607.06450.

layer_norm_quantize(x, weight, bias, eps, dtype) -> Quantized = quantize(layer_norm(...)) without the rounding between.

The result has the dtype of x, whatever the dtype of weight and bias.
"""

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.norm.reference import layer_norm, layer_norm_quantize, rms_norm
from lightx2v_kernels.quantized import LARGEST
from lightx2v_kernels.registry import Op


def rms_norm_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """A projection of two heads, and one third of a fused projection (strided rows) under an fp32 weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 3, 2 * head_dim, generator=generator).to(device, dtype)
    weight = (1 + 0.2 * torch.randn(2 * head_dim, generator=generator)).to(device, dtype)
    return (x[:, :, 0].contiguous(), weight, 1e-6), (x[:, :, 1], weight.float(), 1e-6)


def layer_norm_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """With weight and bias, with both in fp32, and bare. The mean is far from zero, so that leaving it in shows."""
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.randn(2, 33, 3, 2 * head_dim, generator=generator)).to(device, dtype)
    weight, bias = torch.randn(2, 2 * head_dim, generator=generator).to(device, dtype).unbind(0)
    affine = (weight, bias), (weight.float(), bias.float()), (None, None)
    return tuple((x[:, :, i].contiguous() if i == 0 else x[:, :, i], *affine[i], 1e-6) for i in range(3))


def quantize_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Those of layer_norm, each into one of the types in turn."""
    return tuple((*args, kind) for args, kind in zip(layer_norm_examples(device, dtype, head_dim), cycle(LARGEST)))


def unquantized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """What layer_norm_quantize stands for."""
    return layer_norm(x, weight, bias, eps)


OPS = (
    Op("rms_norm", rms_norm, rms_norm_examples),
    Op("layer_norm", layer_norm, layer_norm_examples),
    Op("layer_norm_quantize", layer_norm_quantize, quantize_examples, truth=unquantized),
)
