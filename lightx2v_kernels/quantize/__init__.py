"""From tokens to 8 bits, one scale a token: what a linear layer in int8 or fp8 reads.

quantize(x (..., K), dtype) -> Quantized: scale = max|x| / largest, values = x / scale rounded to the nearest, ties to
even. gelu_quantize(x (..., K), dtype) -> Quantized = quantize(gelu(x)), tanh form, without the rounding in between.

dtype: torch.int8 (largest 127) or torch.float8_e4m3fn (448, saturating). All in fp32. No gradient: rounding has none.
Source: one symmetric scale a token, Dettmers et al. 2022, arXiv:2208.07339, section 2; the tanh form of GELU, Hendrycks
and Gimpel 2016, arXiv:1606.08415.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import widen
from lightx2v_kernels.quantize.reference import gelu_quantize, quantize
from lightx2v_kernels.registry import Op


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Tokens of very different size, one of zeros, a width that no tile divides; in the other type strided tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 33, 2 * head_dim + 16, generator=generator)
    x *= torch.logspace(-2, 2, 33)[:, None]
    x[0, 5] = 0
    x = x.to(device, dtype)
    return (x, torch.int8), (x[:, :, 16:], torch.float8_e4m3fn)


def same(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What quantize stands for."""
    return x


def gelu(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What gelu_quantize stands for."""
    return F.gelu(widen(x), approximate="tanh")


OPS = (
    Op("quantize", quantize, examples, truth=same),
    Op("gelu_quantize", gelu_quantize, examples, truth=gelu),
)
