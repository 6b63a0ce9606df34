"""Adaptive layer norm (adaLN): what the timestep does to the tokens before and after each sub-layer.

modulate(x (B, L, D), shift, scale (B, 1 | L, D) fp32, eps) -> (B, L, D) = layer_norm(x) · (1 + scale) + shift.
gated_residual(x (B, L, D), y (B, L, D), gate (B, 1 | L, D) fp32) -> (B, L, D) = x + y · gate.
All in fp32 with one rounding at the end, to the dtype of x: Wan's residual stream loses its fine detail otherwise.
Source: Peebles and Xie 2022, arXiv:2212.09748 (adaLN-Zero); the fp32 rule from Wan2.1, wan/modules/model.py.
"""

from typing import Any

import torch

from lightx2v_kernels.modulate.reference import gated_residual, modulate
from lightx2v_kernels.registry import Op


def modulate_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """One shift and scale a sample, as slices of the six; then one a token."""
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.randn(2, 33, 2 * head_dim, generator=generator)).to(device, dtype)
    table = 0.5 * torch.randn(2, 6, 2 * head_dim, generator=generator).to(device)
    per_token = 0.5 * torch.randn(2, 2, 33, 2 * head_dim, generator=generator).to(device)
    return (x, table[:, 0:1], table[:, 1:2], 1e-6), (x, per_token[0], per_token[1], 1e-6)


def gated_residual_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """One gate a sample, as a slice of the six; then one a token."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 33, 2 * head_dim, generator=generator).to(device, dtype).unbind(0)
    table = 0.5 * torch.randn(2, 6, 2 * head_dim, generator=generator).to(device)
    per_token = 0.5 * torch.randn(2, 33, 2 * head_dim, generator=generator).to(device)
    return (x, y, table[:, 2:3]), (x, y, per_token)


OPS = (Op("modulate", modulate, modulate_examples), Op("gated_residual", gated_residual, gated_residual_examples))
