"""PyTorch's own fp8 product (cuBLAS and CUTLASS), a scale a row of each side.

Two of them. Adding up in the tensor core's own registers keeps some 14 bits of a sum (DeepSeek-V3, arXiv:2412.19437,
section 3.3.2). What that loses is far below what rounding both sides to e4m3 lost before (2.6 % each), and at
Wan's sizes it runs at 1329, 1300, 1173 and 1265 TFLOP/s instead of 1035, 1028, 951 and 977 (H100, 32760 tokens). So
that one is tried first, and its self-test, over 4096 values, says whether a GPU loses more.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def fp8_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fast: bool,
) -> Tensor:
    """values (..., K), scale (..., 1), weight (N, K), weight_scale (N,) -> (..., N). fast: see above."""
    y = torch._scaled_mm(
        values.reshape(-1, values.shape[-1]),
        weight.t(),
        scale_a=scale.reshape(-1, 1).contiguous(),
        scale_b=weight_scale[None, :],
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return y.view(*values.shape[:-1], weight.shape[0])


def _load(fast: bool) -> Callable[..., Tensor]:
    return partial(fp8_linear, fast=fast)


# Its scales a row are only known for bfloat16 results (PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp).
BACKENDS = tuple(
    Backend(
        "fp8_linear",
        name,
        partial(_load, fast),
        rank=rank,
        devices=frozenset({"cuda"}),
        min_sm=(8, 9),
        dtypes=frozenset({torch.bfloat16}),
    )
    for name, fast, rank in (("torch_scaled_mm", True, 100), ("torch_scaled_mm_exact", False, 300))
)
