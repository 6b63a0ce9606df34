"""Both in fp32, one rounding at the end."""

import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N) in the dtype of x."""
    return F.gelu(F.linear(widen(x), widen(weight), widen(bias)), approximate="tanh").to(x.dtype)


BACKENDS = (Backend("linear_gelu", "reference", lambda: linear_gelu, rank=1000, dtypes=FLOATS),)
