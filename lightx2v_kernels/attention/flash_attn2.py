"""FlashAttention-2 (arXiv:2307.08691) of the package flash-attn, on Ampere and newer."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


@functools.cache
def load() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func

    from lightx2v_kernels.attention._package import one_op

    # The scale is 1 / sqrt(D) where none is given.
    return one_op("flash_attn2", lambda q, k, v: flash_attn_func(q, k, v))


def load_partial() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    from flash_attn import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash_attn_func(q, k, v, return_attn_probs=True)
        return out, lse

    return attention


BACKENDS = (
    Backend(
        "attention",
        "flash_attn2",
        load,
        rank=60,
        package="flash_attn",
        fix="pip install flash-attn --no-build-isolation",
        distribution="flash-attn",  # flash-attn-4 is a folder of the same package, and may be there alone
        majors=frozenset({2}),
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=frozenset(range(8, 257, 8)),
        partial=load_partial,
    ),
)
