"""The input of a convolution over padded frames as one Triton kernel: every value is read once and written once."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def load() -> Callable[..., Tensor]:
    from lightx2v_kernels.conv_input import _triton

    return _triton.conv_input


BACKENDS = (
    Backend(
        "conv_input",
        "triton",
        load,
        rank=100,
        package="triton",
        fix="it comes with PyTorch's CUDA builds for Linux; on Windows pip install triton-windows",
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
    ),
)
