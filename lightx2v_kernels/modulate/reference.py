"""adaLN modulation and the gated residual, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (B, L, D), shift and scale (B, 1 | L, D) fp32 -> (B, L, D) in the dtype of x."""
    normed = F.layer_norm(widen(x), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x and y (B, L, D), gate (B, 1 | L, D) fp32 -> (B, L, D) in the dtype of x."""
    return torch.addcmul(widen(x), widen(y), gate).to(x.dtype)


BACKENDS = (
    Backend("modulate", "reference", lambda: modulate, rank=1000, dtypes=FLOATS),
    Backend("gated_residual", "reference", lambda: gated_residual, rank=1000, dtypes=FLOATS),
)
