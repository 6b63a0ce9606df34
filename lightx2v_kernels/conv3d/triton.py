"""Convolution as a matrix product whose rows are gathered while it runs, in Triton, for half precision on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def load() -> Callable[..., Tensor]:
    from lightx2v_kernels.conv3d import _triton

    return _triton.conv3d


BACKENDS = (
    Backend(
        "conv3d",
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
