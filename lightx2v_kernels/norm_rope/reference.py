"""RMS norm and rotary embedding in fp32, one after the other."""

from torch import Tensor

from lightx2v_kernels.norm.reference import rms_norm
from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend
from lightx2v_kernels.rope.reference import rope


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (B, L, H * d), weight (H * d,) or (d,), cos and sin (L, d/2) fp32 -> (B, L, H, d) in the dtype of x."""
    heads = (-1, 2 * cos.shape[-1])
    normed = rms_norm(widen(x).unflatten(-1, (-1, len(weight))), weight, eps).flatten(2)
    return rope(normed.unflatten(-1, heads), cos, sin).to(x.dtype)


BACKENDS = (Backend("norm_rope", "reference", lambda: norm_rope, rank=1000, dtypes=FLOATS),)
