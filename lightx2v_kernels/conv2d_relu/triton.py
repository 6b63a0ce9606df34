"""Padding and the convolution of `conv3d`, whose last step cuts off, in Triton: two passes in place of three."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def load() -> Callable[..., Tensor]:
    from lightx2v_kernels.conv2d_relu import _triton

    return _triton.conv2d_relu


BACKENDS = (
    Backend(
        "conv2d_relu",
        "triton",
        load,
        rank=400,
        package="triton",
        fix="it comes with PyTorch's CUDA builds for Linux; on Windows pip install triton-windows",
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
    ),
)
