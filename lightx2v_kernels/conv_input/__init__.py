"""Frames made ready for a convolution over padded frames: normalised, activated, padded, in one pass.

conv_input(x (B, C, t, H, W), gamma (C,) | None, padding (h, w), replicate, scale) -> (B, C, t, H', W') with
H' = scale H + 2h and W' = scale W + 2w, channels last in memory, in the dtype of x:

- with gamma, silu(x / sqrt(|x|² + 1e-24) · sqrt(C) · gamma) over the channels; without it x as it is;
- scale 2: every pixel four times, 2x2; scale 1: as it is;
- around each frame h rows and w columns of zeros, or with `replicate` of the pixels at the edge.

The norm is Wan2.1's (Wan-Video/Wan2.1, wan/modules/vae.py, RMS_norm).
"""

from typing import Any

import torch

from lightx2v_kernels.conv_input.reference import conv_input, plain
from lightx2v_kernels.registry import Op


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Zeros and pixels at the edge, a doubled frame, some of the channels, channels first in memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, head_dim, 3, 5, 7, generator=generator).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    gamma = (1 + 0.2 * torch.randn(head_dim, generator=generator)).to(device, dtype)
    return (
        (x, gamma, (1, 1), False, 1),
        (x[:, :24], None, (1, 1), False, 2),
        (x.contiguous(), gamma, (1, 1), True, 1),
        (x, gamma, (0, 0), False, 1),
    )


OPS = (Op("conv_input", conv_input, examples, plain),)
