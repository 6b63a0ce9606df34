"""Our own attention in Triton with q and k in 8 bits, values and weights in the tokens' type."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def load() -> Callable[..., Tensor]:
    from lightx2v_kernels.attention._triton_ops import attention_int8

    return attention_int8


def rotary() -> Callable[..., Tensor]:
    """q and k are rounded where they are normed and turned, and never written in 16 bits."""
    from lightx2v_kernels.attention._triton_ops import rotary_attention_int8

    return rotary_attention_int8


BACKENDS = (
    Backend(
        "attention",
        "triton_int8",
        load,
        rank=96,
        package="triton",
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        head_dims=frozenset({64, 128}),
        max_error=0.02,
        rotary=rotary,
    ),
)
