"""Rotary position embedding in real arithmetic: complex numbers are not compiled by TorchInductor."""

import torch
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, L, H, D), cos and sin (L, D/2) fp32 -> (B, L, H, D) in the dtype of x."""
    even, odd = widen(x).unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, D/2) each
    cos, sin = cos[:, None], sin[:, None]  # (L, 1, D/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


BACKENDS = (Backend("rope", "reference", lambda: rope, rank=1000, dtypes=FLOATS),)
