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
CHANNELS = 128  # of the self-tests
Padding = tuple[int, int, int]


@dataclass(frozen=True)
class FrameKernels:
    """Contracts: lightx2v_kernels/conv_input and lightx2v_kernels/conv3d."""

    conv_input: Callable[[Tensor, Tensor | None, Tensor | None, Padding, bool, int], Tensor]
    conv3d: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def frame_kernels(x: Tensor, weight: Tensor) -> FrameKernels | None:
    """The kernels for a layer that is given x; None where PyTorch's own layers run."""
    if x.device.type != "cuda" or x.dtype not in HALF or weight.dtype != x.dtype or torch.is_grad_enabled():
        return None
    return _chosen(x.device, x.dtype)


@functools.cache
def _chosen(device: torch.device, dtype: torch.dtype) -> FrameKernels | None:
    prepare, convolve = (registry.select(op, registry.AUTO, device, dtype, CHANNELS) for op in ("conv_input", "conv3d"))
    if prepare.package is None:  # nothing but PyTorch: its layers by themselves copy less than its padding here
        return None
    return FrameKernels(prepare.load(), convolve.load())


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

    x: (B, C, t, H, W). past: what the chunk before has given, None at a clip's start.
    """
    lead, height, width = (size - 1 for size in conv.kernel_size)
    weights = None if gamma is None else gamma.flatten()
    padded = kernels.conv_input(x, weights, past, (lead, height // 2, width // 2), replicate, 1)
    made = kernels.conv3d(padded, conv.weight, _bias(conv), residual)
    return made, padded[:, :, padded.shape[2] - lead :]


def convolve_doubled(kernels: FrameKernels, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv, 3x3, over every frame of x (B, C, t, H, W) at twice its height and width."""
    padded = kernels.conv_input(x, None, None, (0, 1, 1), False, 2)
    return kernels.conv3d(padded, conv.weight.unsqueeze(2), _bias(conv), None)


def _bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert conv.bias is not None  # all of these layers have one
    return conv.bias
