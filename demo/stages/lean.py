"""Faster forms of the autoencoder's layers for training on a GPU; the numbers are the same to rounding.

The engine's own forms read clips in chunks and keep float32 inside norms, which costs a trainer memory traffic. Which
form of the causal convolution is fastest depends on width and frame size (1.5 to 2 times apart on an H100), so it is
timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.vae.hunyuan15 import LOOKS_BACK, EdgeConv3d
from lightx2v.vae.wan import CausalConv3d, RMSNorm, State

ConvForm = Callable[[nn.Conv3d, Tensor], Tensor]
Sizes = tuple[tuple[int, int, int], ...]


def drop_frames(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Zero frames on both sides inside the kernel; what sees the future is computed in vain and dropped."""
    lead = conv.kernel_size[0] - 1
    padding = (lead, *conv.padding[1:])
    return F.conv3d(x, conv.weight, conv.bias, padding=padding)[:, :, : x.shape[2]]


def pad_frames(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Zero frames before the clip in a copy of it."""
    return F.conv3d(F.pad(x, (0, 0, 0, 0, conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, padding=conv.padding)


def stack_taps(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """The taps in time as input channels of a 2D convolution."""
    return _stacked(conv, F.pad(x, (0, 0, 0, 0, conv.kernel_size[0] - 1, 0)))


def _stacked(conv: nn.Conv3d, padded: Tensor) -> Tensor:
    taps = conv.kernel_size[0]
    batch, frames = padded.shape[0], padded.shape[2] - taps + 1
    stacked = torch.cat([padded[:, :, tap : tap + frames] for tap in range(taps)], 1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # (out, taps in, h, w), taps before channels as in `stacked`
    made = F.conv2d(stacked.transpose(1, 2).flatten(0, 1), weight, conv.bias, padding=conv.padding[1:])
    return made.unflatten(0, (batch, frames)).transpose(1, 2)


FORMS: Mapping[str, ConvForm] = {"drop": drop_frames, "pad": pad_frames, "stack": stack_taps}


def extend_edges(x: Tensor) -> Tensor:
    """The first frame twice before the clip, the last pixel once beyond every side. By copies: the gradient of torch's
    own replicating pad is a sum of atomic additions."""
    x = torch.cat([x[:, :, :1]] * LOOKS_BACK + [x], 2)
    x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], 3)
    return torch.cat([x[..., :1], x, x[..., -1:]], 4)


def extend(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Edges that go on, then the convolution."""
    return F.conv3d(extend_edges(x), conv.weight, conv.bias)


def extend_and_stack(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Edges that go on, then the taps in time as channels."""
    return _stacked(conv, extend_edges(x))


EDGE_FORMS: Mapping[str, ConvForm] = {"extend": extend, "stack": extend_and_stack}


def _time(form: ConvForm, channels: int, size: int, frames: int, device: torch.device) -> float:
    """Seconds of forward and backward over a batch of typical clips."""
    conv = nn.Conv3d(channels, channels, 3, padding=0 if form in EDGE_FORMS.values() else (0, 1, 1))
    conv = conv.to(device, memory_format=torch.channels_last_3d)
    x = torch.randn(20, channels, frames, size, size, device=device).to(memory_format=torch.channels_last_3d)
    x = x.bfloat16().requires_grad_()
    started = 0.0
    for turn in range(6):
        if turn == 3:
            torch.cuda.synchronize()
            started = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            form(conv, x).float().square().mean().backward()
    torch.cuda.synchronize()
    return (time.monotonic() - started) / 3


def choose_forms(sizes: Sizes, device: torch.device, forms: Mapping[str, ConvForm] = FORMS) -> dict[int, str]:
    """Channels -> name of the fastest form. sizes: channels, pixels of a side and frames where a width occurs."""
    chosen = {}
    for channels, size, frames in sizes:
        seconds = {name: _time(form, channels, size, frames, device) for name, form in forms.items()}
        chosen[channels] = min(seconds, key=seconds.__getitem__)
    return chosen


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-6)
    return x * (norm.gamma.shape[0] ** 0.5 / length).to(x.dtype) * norm.gamma.to(x.dtype)


def _convolve(
    conv: nn.Conv3d,
    form: ConvForm,
    x: Tensor,
    state: State | None = None,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if state is not None:
        raise ValueError("the training forms take whole clips; load a fresh one to stream")
    y = form(conv, x if norm is None else F.silu(norm(x)))
    return y if residual is None else residual + y


def make_lean(vae: nn.Module, forms: Mapping[int, str]) -> None:
    """Let a module's norms and 3x3x3 convolutions take their fast forms from now on."""
    for module in vae.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)
        elif isinstance(module, CausalConv3d) and module.kernel_size[0] > 1:
            fallback = forms[min(forms)]
            name = forms.get(max(module.out_channels, module.in_channels), fallback)
            module.forward = partial(_convolve, module, FORMS[name])
        elif isinstance(module, EdgeConv3d):
            name = forms.get(module.conv.in_channels, forms[min(forms)])
            module.forward = partial(_convolve, module.conv, EDGE_FORMS[name])
