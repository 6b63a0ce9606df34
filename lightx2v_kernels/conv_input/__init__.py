"""Frames made ready for a causal convolution: normalised, activated, padded, with the past before them, in one pass.

conv_input(x (B, C, t, H, W), gamma (C,) | None, past (B, C, p, H', W') | None, padding (p, h, w), replicate, scale)
-> (B, C, p + t, H', W') with H' = scale H + 2h, W' = scale W + 2w, channels last in memory, in the dtype of x:

- with gamma, silu(x / sqrt(|x|² + 1e-24) · sqrt(C) · gamma) over the channels; without it x as it is;
- scale 2: every pixel four times, 2x2; scale 1: as it is;
- around each frame h rows and w columns of zeros, or with `replicate` of the pixels at the edge;
- before them p frames: `past`, which are such frames already (the last p of an earlier result); where it is None zeros,
  or with `replicate` the first frame.

The norm is Wan2.1's (Wan-Video/Wan2.1, wan/modules/vae.py, RMS_norm).
"""

from typing import Any

import torch

from lightx2v_kernels.conv_input.reference import conv_input, plain
from lightx2v_kernels.registry import Op


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """A first and a later chunk, a doubled frame, replicated edges, frames that are channels first in memory."""
    generator = torch.Generator().manual_seed(0)

    def frames(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=torch.channels_last_3d)

    x, gamma = frames(2, head_dim, 3, 5, 7), 1 + 0.2 * frames(1, head_dim, 1, 1, 1).flatten()
    return (
        (x, gamma, None, (2, 1, 1), False, 1),
        (x, gamma, frames(2, head_dim, 2, 7, 9), (2, 1, 1), False, 1),
        (x[:, :24], None, None, (0, 1, 1), False, 2),
        (x.contiguous(), gamma, None, (2, 1, 1), True, 1),
        (x, None, frames(2, head_dim, 2, 5, 7), (2, 0, 0), False, 1),
    )


OPS = (Op("conv_input", conv_input, examples, plain),)
