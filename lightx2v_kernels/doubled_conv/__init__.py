"""A 3x3 convolution over frames of twice the height and width, every pixel four times.

doubled_conv(x (B, C, t, H, W), weight (O, C, 3, 3), bias (O,) | None, relu=False) -> (B, O, t, 2H, 2W), channels last
in memory, in the dtype of x. Around the doubled frames are zeros. relu: negative numbers become 0.
"""

from typing import Any

import torch

from lightx2v_kernels.doubled_conv.reference import doubled_conv
from lightx2v_kernels.registry import Op


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """To half of the channels, to as many from frames that are channels first in memory, to an odd number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, head_dim, 2, 5, 7, generator=generator).to(device, dtype)
    found: list[tuple[Any, ...]] = []
    for out in (head_dim // 2, head_dim, 5):
        weight = torch.randn(out, head_dim, 3, 3, generator=generator) * (9 * head_dim) ** -0.5
        bias = torch.randn(out, generator=generator).to(device, dtype)
        frames = x if out == head_dim else x.contiguous(memory_format=torch.channels_last_3d)
        found.append((frames, weight.to(device, dtype), None if out == 5 else bias, out == head_dim))
    return tuple(found)


OPS = (Op("doubled_conv", doubled_conv, examples),)
