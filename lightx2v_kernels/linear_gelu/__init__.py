"""The first half of a feed-forward: a linear layer and GELU.

linear_gelu(x (..., K), weight (N, K), bias (N,)) -> (..., N) in the dtype of x: gelu(x · weight^T + bias), tanh form.
Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

from typing import Any

import torch

from lightx2v_kernels.linear_gelu.reference import linear_gelu
from lightx2v_kernels.linear_gelu.torch_steps import linear_gelu as in_steps
from lightx2v_kernels.registry import Op


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """A batch of two; one third of a fused projection (strided rows); one token. The bias reaches where GELU bends."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 3, 2 * head_dim, generator=generator).to(device, dtype)
    weight = (torch.randn(176, 2 * head_dim, generator=generator) * (2 * head_dim) ** -0.5).to(device, dtype)
    bias = torch.linspace(-4, 3, 176).to(device, dtype)
    tokens = x[:, :, 0].contiguous(), x[:, :, 1], x[0, :1, 2]
    return tuple((each, weight, bias) for each in tokens)


OPS = (Op("linear_gelu", linear_gelu, examples, plain=in_steps),)
