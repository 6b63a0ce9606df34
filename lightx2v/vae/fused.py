"""The causal convolutions of the VAEs as fused kernels: for half precision on a GPU, where nothing is differentiated.

In PyTorch alone each of these layers is a norm, an activation, a copy that pads and joins, a convolution and a sum, and
every one of them reads and writes all frames. Here they are two passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightx2v_kernels import registry

HALF = (torch.bfloat16, torch.float16)
OPS = ("conv_input", "conv3d", "doubled_conv", "conv2d_relu")
CHANNELS = 128  # of the self-tests


@dataclass(frozen=True)
class FrameKernels:
    """Contracts: lightx2v_kernels/conv_input, conv3d, doubled_conv and conv2d_relu."""

    conv_input: Callable[[Tensor, Tensor | None, tuple[int, int], bool, int], Tensor]
    conv3d: Callable[..., Tensor]
    doubled_conv: Callable[..., Tensor]
    conv2d_relu: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def frame_kernels(x: Tensor, weight: Tensor) -> FrameKernels | None:
    """The kernels for a layer that is given x; None where PyTorch's own layers run."""
    if x.device.type != "cuda" or x.dtype not in HALF or weight.dtype != x.dtype or torch.is_grad_enabled():
        return None
    return _chosen(x.device, x.dtype)


@functools.cache
def _chosen(device: torch.device, dtype: torch.dtype) -> FrameKernels | None:
    chosen = [registry.select(op, registry.AUTO, device, dtype, CHANNELS) for op in OPS]
    if all(backend.package is None for backend in chosen):  # PyTorch's layers by themselves copy less
        return None
    return FrameKernels(*(backend.load() for backend in chosen))


def convolve_causally(
    kernels: FrameKernels,
    conv: nn.Conv3d,
    x: Tensor,
    past: Tensor | None,
    *,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    replicate: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual + conv(x), of the norm and SiLU of x if there is a gamma; and the past for the next chunk.

    x: (B, C, t, H, W). past: what the chunk before has given, None at a clip's start. replicate: beyond the edges the
    last pixel goes on, and before the clip its first frame, instead of zeros.
    """
    lead, height, width = (size - 1 for size in conv.kernel_size)
    weights = None if gamma is None else gamma.flatten()
    padded = kernels.conv_input(x, weights, (height // 2, width // 2), replicate, 1)
    if replicate and past is None:
        past = torch.cat([padded[:, :, :1]] * lead, 2)
    return kernels.conv3d(padded, past, conv.weight, _bias(conv), residual), _last(padded, past, lead)


def convolve_beside_past(
    kernels: FrameKernels, conv: nn.Conv2d, x: Tensor, past: Tensor | None, *, relu: bool
) -> tuple[Tensor, Tensor]:
    """conv, 3x3, over every frame of x (B, C, t, H, W) joined with the one before it as 2C channels; and the past for
    the next chunk. past: what the chunk before has given, None (zeros) at a clip's start. relu: of the result."""
    padded = kernels.conv_input(x, None, (1, 1), False, 1)
    now, before = conv.weight.chunk(2, 1)
    weight = torch.stack([before, now], 2).contiguous(memory_format=torch.channels_last_3d)
    return kernels.conv3d(padded, past, weight, _bias(conv), None, relu), _last(padded, past, 1)


def _last(frames: Tensor, past: Tensor | None, count: int) -> Tensor:
    """The last `count` frames by themselves, with those of the past where there are fewer."""
    if frames.shape[2] == count:
        return frames
    if frames.shape[2] < count:
        before = torch.zeros_like(frames[:, :, :1]).expand(-1, -1, count, -1, -1) if past is None else past
        frames = torch.cat([before[:, :, frames.shape[2] :], frames], 2)
    return frames[:, :, frames.shape[2] - count :].clone()


def _bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert conv.bias is not None  # all of these layers have one
    return conv.bias
