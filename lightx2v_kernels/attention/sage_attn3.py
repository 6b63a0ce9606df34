"""SageAttention 3 (arXiv:2505.11594) for Blackwell: all products in microscaled FP4."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


@functools.cache
def load() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from sageattn3 import sageattn3_blackwell

    from lightx2v_kernels.attention._package import one_op

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it reads (B, H, L, D)
        k = k.clone(memory_format=torch.contiguous_format)  # and writes into k
        return sageattn3_blackwell(q, k, v, is_causal=False).transpose(1, 2)

    return one_op("sage_attn3", attention)


BACKENDS = (
    Backend(
        "attention",
        "sage_attn3",
        load,
        rank=83,
        package="sageattn3",
        fix="build the folder sageattention3_blackwell of github.com/thu-ml/SageAttention",
        devices=frozenset({"cuda"}),
        min_sm=(10, 0),
        max_sm=(12, 1),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=frozenset({64, 128}),
        max_error=0.25,  # not measured: E2M1 has one bit of mantissa, which leaves about 0.1 in each operand
    ),
)
