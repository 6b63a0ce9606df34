"""Tokens in 8 bits with one scale each, and how the result of any op is laid out for a comparison."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The largest magnitude of each type. -128 is left out: a symmetric range negates without a special case.
# float8_e4m3fn: Micikevicius et al. 2022, arXiv:2209.05433, table 1.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

# A token whose largest magnitude is below this is all zeros: 448 / 1e-30 is far from fp32's overflow.
SMALLEST_AMAX = 1e-30


@dataclass(frozen=True, eq=False)
class Quantized:
    """Tokens x ~= values * scale: symmetric, scale = amax / LARGEST, rounded to the nearest (ties to even).

    values: (..., K) int8 or float8_e4m3fn. scale: (..., 1) float32, one a token; NaN or inf if the token held one.
    """

    values: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(..., K) in `dtype`, computed in fp32."""
        return (self.values.float() * self.scale).to(dtype)


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of an op's result, in order; tokens in 8 bits as the fp32 that they stand for.

    Raises TypeError for anything but a Tensor, a Quantized or a tuple of them.
    """
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, Quantized):
        return (result.dense(torch.float32),)
    if isinstance(result, tuple):
        return tuple(tensor for part in result for tensor in tensors(part))
    raise TypeError(f"an op returns a Tensor, a Quantized or a tuple of them, got {type(result).__name__}")


def widths(result: Any) -> tuple[torch.dtype, ...]:
    """The dtype in which each of `tensors(result)` is stored."""
    if isinstance(result, tuple):
        return tuple(width for part in result for width in widths(part))
    return ((result.values if isinstance(result, Quantized) else result).dtype,)
