"""FlashAttention-4 of flash-attn-4 (flash_attn.cute, which CuTe compiles on first use), for Hopper and Blackwell."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


@functools.cache
def load() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from lightx2v_kernels.attention._package import one_op

    flash_attn_func: Any = importlib.import_module("flash_attn.cute").flash_attn_func
    return one_op("flash_attn4", lambda q, k, v: flash_attn_func(q, k, v)[0])  # and the softmax' logarithm


BACKENDS = (
    Backend(
        "attention",
        "flash_attn4",
        load,
        rank=55,
        package="flash_attn",  # a package of two projects; which of them is there, the distribution says
        distribution="flash-attn-4",
        majors=frozenset({4}),
        fix="pip install --pre flash-attn-4",
        devices=frozenset({"cuda"}),
        min_sm=(9, 0),
        max_sm=(12, 1),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=frozenset(range(8, 129, 8)),
    ),
)
