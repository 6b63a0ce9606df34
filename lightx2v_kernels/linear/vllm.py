"""vLLM's CUTLASS products. Source of the API: vllm-project/vllm, vllm/_custom_ops.py, cutlass_scaled_mm."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend


def _load() -> Callable[..., Tensor]:
    from vllm._custom_ops import cutlass_scaled_mm

    def linear(
        values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """values (..., K), scale (..., 1), weight (N, K), weight_scale (N,) -> (..., N)."""
        flat = values.reshape(-1, values.shape[-1])
        added = None if bias is None else bias.to(dtype)
        by_token, by_row = scale.reshape(-1, 1).contiguous(), weight_scale[None, :]
        y = cutlass_scaled_mm(flat, weight.t(), by_token, by_row, dtype, added)
        return y.view(*values.shape[:-1], weight.shape[0])

    return linear


BACKENDS = tuple(
    Backend(
        op,
        "vllm",
        _load,
        rank=rank,
        package="vllm",
        devices=frozenset({"cuda"}),
        min_sm=low,
        dtypes=frozenset({torch.bfloat16, torch.float16}),
    )
    for op, low, rank in (("int8_linear", (8, 0), 150), ("fp8_linear", (8, 9), 250))
)
