"""PyTorch's own, one after the other, at the dtype of the tokens."""

import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N) in the dtype of x."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


BACKENDS = (Backend("linear_gelu", "torch_steps", lambda: linear_gelu, rank=500, dtypes=FLOATS),)
