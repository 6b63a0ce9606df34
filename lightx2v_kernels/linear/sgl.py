"""SGLang's CUTLASS products. Source of the API: sgl-project/sglang, sgl-kernel/python/sgl_kernel/gemm.py."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def _load(name: str) -> Callable[..., Tensor]:
    import sgl_kernel

    product = getattr(sgl_kernel, name)

    def linear(
        values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """values (..., K), scale (..., 1), weight (N, K), weight_scale (N,) -> (..., N)."""
        flat = values.reshape(-1, values.shape[-1])
        added = None if bias is None else bias.to(dtype)
        y = product(flat, weight.t(), scale.reshape(-1).contiguous(), weight_scale, out_dtype=dtype, bias=added)
        return y.view(*values.shape[:-1], weight.shape[0])

    return linear


BACKENDS = tuple(
    Backend(
        op,
        "sgl",
        partial(_load, name),
        rank=rank,
        package="sgl_kernel",
        fix="pip install sgl-kernel",
        devices=frozenset({"cuda"}),
        min_sm=low,
        dtypes=frozenset({torch.bfloat16, torch.float16}),
    )
    for op, name, low, rank in (
        ("int8_linear", "int8_scaled_mm", (8, 0), 100),
        ("fp8_linear", "fp8_scaled_mm", (8, 9), 200),
    )
)
