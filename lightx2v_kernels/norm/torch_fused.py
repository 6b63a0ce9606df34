"""PyTorch's own norms at the dtype of the tokens: one kernel, fp32 statistics inside, no fp32 copy of x in memory."""

import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.norm import reference
from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in the dtype of x."""
    if weight.dtype != x.dtype:  # rounding an fp32 weight to x's dtype would be a second rounding
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight and bias (D,) or None -> (..., D) in the dtype of x."""
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        return reference.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


BACKENDS = (
    Backend("rms_norm", "torch_fused", lambda: rms_norm, rank=500, dtypes=FLOATS),
    Backend("layer_norm", "torch_fused", lambda: layer_norm, rank=500, dtypes=FLOATS),
)
