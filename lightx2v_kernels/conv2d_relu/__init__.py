"""A convolution that keeps the size of its frames, and ReLU after it.

conv2d_relu(x (N, C, H, W), weight (O, C, kh, kw), bias (O,), residual (N, O, H, W) | None) -> (N, O, H, W) in the dtype
and the memory order of x: relu(conv(x) + bias + residual), zeros around the frames.
"""

from typing import Any

import torch

from lightx2v_kernels.conv2d_relu.reference import conv2d_relu
from lightx2v_kernels.conv2d_relu.torch_steps import conv2d_relu as in_steps
from lightx2v_kernels.registry import Op
from lightx2v_kernels.timings import Workload


def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """With and without a residual; 64 channels as in tiny autoencoders, and to three."""
    generator = torch.Generator().manual_seed(0)

    def frames(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator).to(device, dtype)
        return made.contiguous(memory_format=torch.channels_last)

    x, weight = frames(3, 64, 10, 14), frames(64, 64, 3, 3) * 576**-0.5
    bias = torch.linspace(-1, 1, 64).to(device, dtype)
    return (x, weight, bias, frames(3, 64, 10, 14)), (x, weight[:8], bias[:8], None)


def clip(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Any, ...]:
    """Of taew2_1 at half of 832x480, three latent frames."""
    _, weight, bias, _ = examples(device, dtype, head_dim)[0]
    generator = torch.Generator(device).manual_seed(0)
    frames = torch.randn(6, 64, 240, 416, generator=generator, device=device, dtype=dtype)
    return frames.contiguous(memory_format=torch.channels_last), weight, bias, None


WORKLOADS = {"conv2d_relu": {"self": Workload(clip, lambda frames: frames[:1])}}
OPS = (Op("conv2d_relu", conv2d_relu, examples, plain=in_steps),)
