"""Our own attention in Triton, at the accuracy of the tokens' type."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def load() -> Callable[..., Tensor]:
    from lightx2v_kernels.attention._triton_ops import attention

    return attention


BACKENDS = (
    Backend(
        "attention",
        "triton",
        load,
        rank=95,
        package="triton",
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        head_dims=frozenset({64, 128}),
    ),
)
