"""Doubling and convolution one after the other, in fp32 and at the frames' own type."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """See the contract in `__init__`; one rounding, at the end."""
    return plain(widen(x), widen(weight), None if bias is None else widen(bias), relu).to(x.dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """The same at the type of x."""
    rows = x.permute(0, 2, 3, 4, 1)
    frames = rows.flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    made = F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    made = made.relu_() if relu else made
    return made.permute(0, 2, 3, 1).unflatten(0, x.shape[0:3:2]).permute(0, 4, 1, 2, 3)


BACKENDS = (
    Backend("doubled_conv", "reference", lambda: doubled_conv, rank=1000, dtypes=FLOATS),
    Backend("doubled_conv", "torch", lambda: plain, rank=500, dtypes=FLOATS),
)
