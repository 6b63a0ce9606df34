"""The convolution at the size before doubling, with four kernels of 2x2, in Triton."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def load() -> Callable[..., Tensor]:
    from lightx2v_kernels.doubled_conv import _triton

    return _triton.doubled_conv


BACKENDS = (
    Backend(
        "doubled_conv",
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
