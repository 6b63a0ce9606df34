"""Convolution in time, height and width over frames that are padded already, and what is added to it.

conv3d(x (B, C, T, H, W), weight (O, C, kt, kh, kw), bias (O,), residual (B, O, T', H', W') | None)
-> (B, O, T', H', W') with T' = T - kt + 1 and so on, channels last in memory, in the dtype of x.

Stride 1, no padding: what lies before, above and beside the frames is in x (see `conv_input`).
"""

from typing import Any

import torch

from lightx2v_kernels.conv3d.reference import conv3d
from lightx2v_kernels.registry import Op

KERNELS = ((3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1))


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Each kernel of the VAEs, with and without a residual; the outputs are fewer, more and three channels."""
    generator = torch.Generator().manual_seed(0)

    def frames(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=torch.channels_last_3d)

    found = []
    for kernel, channels, out in zip(KERNELS, (96, head_dim, 64, 32), (96, 3, head_dim, 96), strict=True):
        x = frames(2, channels, 2 + kernel[0], 6 + kernel[1], 8 + kernel[2])
        weight = frames(out, channels, *kernel) * (channels * kernel[0] * kernel[1] * kernel[2]) ** -0.5
        residual = frames(2, out, 3, 7, 9) if out != 3 else None
        found.append((x, weight, frames(out, 1, 1, 1, 1).flatten(), residual))
    return tuple(found)


OPS = (Op("conv3d", conv3d, examples),)
