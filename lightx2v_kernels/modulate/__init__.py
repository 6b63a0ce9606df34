"""Adaptive layer norm (adaLN): what the timestep does to the tokens before and after each sub-layer.

modulate(x (B, L, D), shift, scale (B, 1 | L, D) fp32, eps) -> (B, L, D) = layer_norm(x) · (1 + scale) + shift.
gated_residual(x (B, L, D), y (B, L, D), gate (B, 1 | L, D) fp32) -> (B, L, D) = x + y · gate.

The end of one sub-layer and the start of the next in one pass over the tokens; gate None is 1, as after attention to
text:
residual_modulate(x, y, gate | None, shift, scale, eps) -> x' = x + y · gate, modulate(x', ...), both (B, L, D).
residual_layer_norm(x, y, gate | None, weight (D,) | None, bias (D,) | None, eps) -> x', layer_norm(x', ...).

modulate_quantize, residual_modulate_quantize, residual_layer_norm_quantize(..., dtype): the normed tokens in 8 bits,
straight from fp32 (see `quantize`).

All in fp32 with one rounding at the end, to the dtype of x: Wan's residual stream loses its fine detail otherwise. What
is normed is x' as it is kept.
Source: Peebles and Xie 2022, arXiv:2212.09748 (adaLN-Zero); the fp32 rule from Wan2.1, wan/modules/model.py.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch

from lightx2v_kernels.modulate.reference import (
    gated_residual,
    modulate,
    modulate_quantize,
    residual_layer_norm,
    residual_layer_norm_quantize,
    residual_modulate,
    residual_modulate_quantize,
)
from lightx2v_kernels.quantized import LARGEST
from lightx2v_kernels.registry import Op

Arguments = tuple[tuple[Any, ...], ...]
Examples = Callable[[torch.device, torch.dtype, int], Arguments]


def modulate_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> Arguments:
    """One shift and scale a sample, as slices of the six; then one a token."""
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.randn(2, 33, 2 * head_dim, generator=generator)).to(device, dtype)
    table = 0.5 * torch.randn(2, 6, 2 * head_dim, generator=generator).to(device)
    per_token = 0.5 * torch.randn(2, 2, 33, 2 * head_dim, generator=generator).to(device)
    return (x, table[:, 0:1], table[:, 1:2], 1e-6), (x, per_token[0], per_token[1], 1e-6)


def gated_residual_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> Arguments:
    """One gate a sample, as a slice of the six; then one a token."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 33, 2 * head_dim, generator=generator).to(device, dtype).unbind(0)
    table = 0.5 * torch.randn(2, 6, 2 * head_dim, generator=generator).to(device)
    per_token = 0.5 * torch.randn(2, 33, 2 * head_dim, generator=generator).to(device)
    return (x, y, table[:, 2:3]), (x, y, per_token)


def residual_modulate_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> Arguments:
    """Tables a sample, tables a token, and no gate; the second and third with strided tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = (1 + torch.randn(2, 33, 2, 2 * head_dim, generator=generator)).to(device, dtype)
    x, y = tokens.unbind(2)
    table = 0.5 * torch.randn(2, 6, 2 * head_dim, generator=generator).to(device)
    per_token = 0.5 * torch.randn(3, 2, 33, 2 * head_dim, generator=generator).to(device)
    return (
        (x.contiguous(), y.contiguous(), table[:, 2:3], table[:, 3:4], table[:, 4:5], 1e-6),
        (x, y, *per_token, 1e-6),
        (x, y, None, table[:, 3:4], table[:, 4:5], 1e-6),
    )


def residual_layer_norm_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> Arguments:
    """With a gate, weight and bias; without a gate under fp32 weights; bare."""
    generator = torch.Generator().manual_seed(1)
    (x, y, gate, *_), (_, _, per_token, *_), _ = residual_modulate_examples(device, dtype, head_dim)
    weight, bias = torch.randn(2, 2 * head_dim, generator=generator).to(device, dtype).unbind(0)
    return (
        (x, y, gate, weight, bias, 1e-6),
        (x, y, None, weight.float(), bias.float(), 1e-6),
        (x, y, per_token, None, None, 1e-6),
    )


def into_each_type(examples: Examples) -> Examples:
    """The same arguments, each into one of the types in turn."""
    return lambda *place: tuple((*args, kind) for args, kind in zip(examples(*place), cycle(LARGEST), strict=False))


def without_dtype(op: Callable[..., Any]) -> Callable[..., Any]:
    """What the quantised form of an op stands for."""
    return lambda *args: op(*args[:-1])


OPS = (
    Op("modulate", modulate, modulate_examples),
    Op("gated_residual", gated_residual, gated_residual_examples),
    Op("residual_modulate", residual_modulate, residual_modulate_examples),
    Op("residual_layer_norm", residual_layer_norm, residual_layer_norm_examples),
    Op("modulate_quantize", modulate_quantize, into_each_type(modulate_examples), truth=without_dtype(modulate)),
    Op(
        "residual_modulate_quantize",
        residual_modulate_quantize,
        into_each_type(residual_modulate_examples),
        truth=without_dtype(residual_modulate),
    ),
    Op(
        "residual_layer_norm_quantize",
        residual_layer_norm_quantize,
        into_each_type(residual_layer_norm_examples),
        truth=without_dtype(residual_layer_norm),
    ),
)
