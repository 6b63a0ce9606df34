"""SageAttention 1 (arXiv:2410.02367), in Triton: q and k in int8, a scale a block; p and v in float16."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


@functools.cache
def load() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from sageattention import sageattn

    from lightx2v_kernels.attention._package import one_op

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its own smoothing writes into k.
        smooth = k - k.mean(1, keepdim=True)
        return sageattn(q, smooth, v, tensor_layout="NHD", is_causal=False, smooth_k=False)

    return one_op("sage_attn", attention)


BACKENDS = (
    Backend(
        "attention",
        "sage_attn",
        load,
        rank=82,
        package="sageattention",
        fix="pip install sageattention==1.0.6",
        distribution="sageattention",  # 2.x has the same import name
        majors=frozenset({1}),
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=frozenset({64, 96, 128}),
        max_error=0.03,  # 0.013 on random data, 32760 tokens, an H100
    ),
)
