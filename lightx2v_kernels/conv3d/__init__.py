"""Causal convolution in time, height and width over frames that are padded already, and what is added to it.

conv3d(x (B, C, t, H', W'), past (B, C, kt - 1, H', W') | None, weight (O, C, kt, kh, kw), bias (O,),
residual (B, O, t, H, W) | None, relu=False) -> (B, O, t, H, W) with H = H' - kh + 1 and W = W' - kw + 1, channels last
in memory, in the dtype of x.

Stride 1. What lies around the frames is in x (see `conv_input`). What lies before them is `past`; None: zeros.
relu: negative numbers of the sum become 0.
"""

from typing import Any

import torch

from lightx2v_kernels.conv3d.reference import conv3d
from lightx2v_kernels.registry import Op

KERNELS = ((3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1))


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Each kernel of the VAEs, with and without past and residual; to three, 24, 96, 160 and 192 channels, of which
    each takes other tiles."""
    generator = torch.Generator().manual_seed(0)

    def frames(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=torch.channels_last_3d)

    found: list[tuple[Any, ...]] = []
    for kernel, channels, out in zip(
        (*KERNELS, KERNELS[0]), (96, head_dim, 64, 32, 24), (96, 3, 192, 160, 24), strict=True
    ):
        height, width = 6 + kernel[1], 8 + kernel[2]
        x = frames(2, channels, 3, height, width)
        weight = frames(out, channels, *kernel) * (channels * kernel[0] * kernel[1] * kernel[2]) ** -0.5
        bias, residual = frames(out, 1, 1, 1, 1).flatten(), frames(2, out, 3, 7, 9)
        past = frames(2, channels, kernel[0] - 1, height, width) if kernel[0] > 1 else None
        found += [(x, past, weight, bias, residual), (x.contiguous(), None, weight, bias, None, True)]
    return tuple(found)


OPS = (Op("conv3d", conv3d, examples),)
