"""The input of a convolution over padded frames, step by step, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend

Padding = tuple[int, int]


def conv_input(x: Tensor, gamma: Tensor | None, padding: Padding, replicate: bool, scale: int) -> Tensor:
    """See the contract in `__init__`; one rounding, at the end."""
    y = widen(x)
    if gamma is not None:
        size = (y.square().sum(1, keepdim=True) + 1e-24).sqrt()
        y = F.silu(y / size * x.shape[1] ** 0.5 * widen(gamma).view(-1, 1, 1, 1))
    return padded(y.to(x.dtype), padding, replicate, scale)


def plain(x: Tensor, gamma: Tensor | None, padding: Padding, replicate: bool, scale: int) -> Tensor:
    """As one would write it in PyTorch: the norm and the activation each round."""
    if gamma is not None:
        rows = x.movedim(1, -1)
        rows = F.rms_norm(rows, (x.shape[1],), gamma.to(x.dtype), 1e-24 / x.shape[1])
        x = F.silu(rows.movedim(-1, 1))
    return padded(x, padding, replicate, scale)


def padded(x: Tensor, padding: Padding, replicate: bool, scale: int) -> Tensor:
    """x doubled, with edges."""
    h, w = padding
    if scale != 1:
        x = x.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    x = F.pad(x, (w, w, h, h, 0, 0), mode="replicate" if replicate else "constant")
    return x.contiguous(memory_format=torch.channels_last_3d)


BACKENDS = (
    Backend("conv_input", "reference", lambda: conv_input, rank=1000, dtypes=FLOATS),
    Backend("conv_input", "torch", lambda: plain, rank=500, dtypes=FLOATS),
)
