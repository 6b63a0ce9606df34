"""Convolution in fp32, and PyTorch's own at the frames' type: cuDNN on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def conv3d(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool = False
) -> Tensor:
    """See the contract in `__init__`; one rounding, at the end."""
    made = F.conv3d(_joined(widen(x), past, weight), widen(weight), widen(bias))
    made = made if residual is None else made + widen(residual)
    return (made.relu() if relu else made).to(x.dtype)


def cudnn(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool = False
) -> Tensor:
    """The same through PyTorch's convolution at the type of x."""
    made = F.conv3d(_joined(x, past, weight), weight, bias)
    made = made if residual is None else made + residual
    return made.relu() if relu else made


def _joined(x: Tensor, past: Tensor | None, weight: Tensor) -> Tensor:
    lead = weight.shape[2] - 1
    if not lead:
        return x
    return F.pad(x, (0, 0, 0, 0, lead, 0)) if past is None else torch.cat([past.to(x.dtype), x], 2)


BACKENDS = (
    Backend("conv3d", "reference", lambda: conv3d, rank=1000, dtypes=FLOATS),
    Backend("conv3d", "torch", lambda: cudnn, rank=500, dtypes=FLOATS),
)
