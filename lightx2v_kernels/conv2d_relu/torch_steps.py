"""PyTorch's own, one after the other, at the dtype of the frames."""

import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """See the contract in `__init__`."""
    made = F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
    return (made if residual is None else made + residual).relu()


BACKENDS = (Backend("conv2d_relu", "torch_steps", lambda: conv2d_relu, rank=500, dtypes=FLOATS),)
