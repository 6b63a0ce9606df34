"""PyTorch's own int8 product, scaled in a second pass: half the memory of bf16, and about its speed (819 to 888 TFLOP/s
at Wan's sizes on an H100, where bf16 has 663 to 797). For where Triton is missing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend

CHUNK = 4096  # tokens at once, so that their int32 sums take 226 MB at 13824 columns
LEAST = 17  # tokens that torch._int_mm takes


def int8_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """values (..., K), scale (..., 1), weight (N, K), weight_scale (N,) -> (..., N)."""
    flat, by_token = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1)
    out = torch.empty(len(flat), len(weight), dtype=dtype, device=values.device)
    for start in range(0, len(flat), CHUNK):
        rows = slice(start, start + CHUNK)
        part = flat[rows]
        sums = torch._int_mm(F.pad(part, (0, 0, 0, max(0, LEAST - len(part)))), weight.t())[: len(part)]
        y = sums * by_token[rows] * weight_scale
        out[rows] = y if bias is None else y + bias
    return out.view(*values.shape[:-1], len(weight))


BACKENDS = (
    Backend(
        "int8_linear",
        "torch_int_mm",
        lambda: int8_linear,
        rank=600,
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=FLOATS,
    ),
)
