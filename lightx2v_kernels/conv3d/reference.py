"""Convolution in fp32, and PyTorch's own at the frames' type: cuDNN on a GPU."""

import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """See the contract in `__init__`; one rounding, at the end."""
    made = F.conv3d(widen(x), widen(weight), widen(bias))
    return (made if residual is None else made + widen(residual)).to(x.dtype)


def cudnn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """The same through PyTorch's convolution at the type of x."""
    made = F.conv3d(x, weight, bias)
    return made if residual is None else made + residual


BACKENDS = (
    Backend("conv3d", "reference", lambda: conv3d, rank=1000, dtypes=FLOATS),
    Backend("conv3d", "torch", lambda: cudnn, rank=500, dtypes=FLOATS),
)
