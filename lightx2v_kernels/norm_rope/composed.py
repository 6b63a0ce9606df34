"""The fastest two of PyTorch's own, one after the other: what a CPU runs."""

from torch import Tensor

from lightx2v_kernels.norm.torch_fused import rms_norm
from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend
from lightx2v_kernels.rope.torch_complex import rope


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (B, L, H * d), weight (H * d,) or (d,), cos and sin (L, d/2) fp32 -> (B, L, H, d) in the dtype of x."""
    heads = (-1, 2 * cos.shape[-1])
    if len(weight) == x.shape[-1]:
        return rope(rms_norm(x, weight, eps).unflatten(-1, heads), cos, sin)
    return rope(rms_norm(x.unflatten(-1, heads), weight, eps), cos, sin)


BACKENDS = (Backend("norm_rope", "composed", lambda: norm_rope, rank=500, dtypes=FLOATS),)
