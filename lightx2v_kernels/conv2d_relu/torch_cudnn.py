"""cuDNN's convolution, which adds and cuts off before it writes: one pass over the frames in place of three.

No gradient: PyTorch's two ops for it have none.
"""

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """See the contract in `__init__`."""
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], padding, [1, 1], 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, [1, 1], padding, [1, 1], 1)


BACKENDS = (
    Backend(
        "conv2d_relu",
        "torch_cudnn",
        lambda: conv2d_relu,
        rank=300,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
    ),
)
