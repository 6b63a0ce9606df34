"""Wan2.1's causal video autoencoder: frames (B, 3, F, H, W) <-> raw latents (B, 16, T, H/8, W/8), F = 4 (T - 1) + 1.

Every layer works on a chunk of any number of frames. What a layer must remember of earlier chunks travels in a `State`
that the caller owns: None means "this chunk is the whole clip" (training), an empty dict "this chunk starts a clip",
and the dict that a call has filled continues it. Both ways compute the same numbers.
The network and its key names are those of Wan-Video/Wan2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[nn.Module, Tensor]
"""Frames (B, C, 1 or 2, h, w) that a layer needs again with the next chunk, keyed by the layer.
Tensors are replaced, never written to, so a shallow copy of the dict is a snapshot."""


@dataclass(frozen=True)
class WanVAEConfig:
    """Widths of the network: 96 and 16 are Wan2.1's own; LightVAE has 24 base channels."""

    base_channels: int = 96
    latent_channels: int = 16


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels (dim 1), computed in float32."""

    def __init__(self, channels: int, *, frames: bool) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *((1, 1, 1) if frames else (1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        # Not vector_norm or F.normalize: over dim 1 of contiguous frames these are 5 to 20 times slower on a CPU.
        square = x.float().square().sum(1, keepdim=True).clamp_min(1e-24)
        return (x * (self.scale * square.rsqrt()) * self.gamma).to(x.dtype)


class CausalConv3d(nn.Conv3d):
    """Conv3d that sees the past only: frames before a chunk come from `state`, frames before a clip are zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        lead = self.kernel_size[0] - 1
        if not lead:
            return convolve(self, x)
        past = None if state is None else state.get(self)
        if past is None:
            past = x.new_zeros(*x.shape[:2], lead, *x.shape[3:])
        x = torch.cat([past, x], 2)
        if state is not None:
            state[self] = x[:, :, -lead:].clone()
        return convolve(self, x)


class Chain(nn.Sequential):
    """A Sequential that hands the state to those of its layers that use one."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        for layer in self:
            x = layer(x, state) if isinstance(layer, STATEFUL) else layer(x)
        return x


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = Chain(
            RMSNorm(in_channels, frames=True),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            RMSNorm(out_channels, frames=True),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original: it holds the place of key 5
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return self.shortcut(x) + self.residual(x, state)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, frames=False)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames, batch = fold_time(x)
        n, c, h, w = frames.shape
        # (n, 3c, h, w) -> (n, 1, h w, 3c) -> three times (n, 1, h w, c)
        q, k, v = self.to_qkv(self.norm(frames)).view(n, 1, 3 * c, h * w).transpose(2, 3).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(2, 3).reshape(n, c, h, w))
        return x + unfold_time(y, batch)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `time`, doubles every frame but the clip's first."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        # The interpolation has no weights: Identity holds the place of key 0.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self.double_frames(x, self.time_conv, state)
        frames, batch = fold_time(x)
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        return unfold_time(self.resample(frames), batch)

    @staticmethod
    def double_frames(x: Tensor, conv: CausalConv3d, state: State | None) -> Tensor:
        if state is not None and conv in state:
            return split_frames(conv(x, state))
        # The clip's first frame stays one frame, and to the convolution it counts as zeros, like what is before it.
        first, x = x[:, :, :1], x[:, :, 1:]
        if x.shape[2]:
            return torch.cat([first, split_frames(conv(x, state))], 2)
        if state is not None:
            state[conv] = first.new_zeros(*first.shape[:2], 2, *first.shape[3:])
        return first


class Downsample(nn.Module):
    """Halves height and width; with `time`, also the frames after the clip's first: 1 + 2n -> 1 + n, then 2n -> n."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        frames, batch = fold_time(x)
        x = unfold_time(self.resample(frames), batch)
        return x if self.time_conv is None else self.halve_frames(x, self.time_conv, state)

    @staticmethod
    def halve_frames(x: Tensor, conv: nn.Conv3d, state: State | None) -> Tensor:
        past = None if state is None else state.get(conv)
        if state is not None:
            state[conv] = x[:, :, -1:].clone()
        if past is not None:
            return convolve(conv, torch.cat([past, x], 2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], convolve(conv, x)], 2)


STATEFUL = (CausalConv3d, ResidualBlock, Upsample, Downsample)


class Encoder(nn.Module):
    def __init__(self, base: int, out_channels: int) -> None:
        super().__init__()
        widths = (base, base, base * 2, base * 4, base * 4)
        stages: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            stages += [ResidualBlock(before, after), ResidualBlock(after, after)]
            if i < 3:
                stages.append(Downsample(after, time=i > 0))
        self.conv1 = CausalConv3d(3, base, (3, 3, 3))
        self.downsamples = Chain(*stages)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], out_channels)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        x = self.downsamples(self.conv1(x, state), state)
        return self.head(self.middle(x, state), state)


class Decoder(nn.Module):
    def __init__(self, base: int, in_channels: int) -> None:
        super().__init__()
        # Each upsampling halves the width, so a stage starts with half of what the stage before ended with.
        widths = ((base * 4, base * 4), (base * 2, base * 4), (base * 2, base * 2), (base, base))
        stages: list[nn.Module] = []
        for i, (before, after) in enumerate(widths):
            stages += [ResidualBlock(before, after), ResidualBlock(after, after), ResidualBlock(after, after)]
            if i < 3:
                stages.append(Upsample(after, time=i < 2))
        self.conv1 = CausalConv3d(in_channels, base * 4, (3, 3, 3))
        self.middle = middle(base * 4)
        self.upsamples = Chain(*stages)
        self.head = head(base, 3)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        x = self.middle(self.conv1(x, state), state)
        return self.head(self.upsamples(x, state), state)


class WanVAE(nn.Module):
    """The network, with the key names of Wan2.1_VAE.pth.

    `posterior` and `reconstruct` are differentiable and take a whole clip (state None) or a chunk of one.
    """

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WanVAEConfig()
        z = config.latent_channels
        self.encoder = Encoder(config.base_channels, z * 2)
        self.conv1 = CausalConv3d(z * 2, z * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder(config.base_channels, z)

    def posterior(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, z, T, H/8, W/8) float32, of frames (B, 3, F, H, W) in [-1, 1].

        F is 4n + 1 for a whole clip or its first chunk, 4n for a later chunk.
        """
        mean, log_variance = pointwise_float32(self.conv1, self.encoder(frames, state)).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Frames (B, 3, F, H, W), not clamped to [-1, 1], of raw latents (B, z, T, h, w).

        F is 4T - 3 for a whole clip or its first chunk, 4T for a later chunk.
        """
        return self.decoder(pointwise_float32(self.conv2, raw).to(self.conv2.weight.dtype), state)


def middle(channels: int) -> Chain:
    return Chain(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head(in_channels: int, out_channels: int) -> Chain:
    return Chain(RMSNorm(in_channels, frames=True), nn.SiLU(), CausalConv3d(in_channels, out_channels, (3, 3, 3)))


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x), through oneDNN for float32 on a CPU.

    PyTorch's own rule (aten/src/ATen/native/Convolution.cpp, use_mkldnn) counts batch * channels * frames * height and
    below 20480 takes a plain loop, which for the short chunks of a stream is 3 to 15 times slower.
    """
    onednn = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not onednn or x.dtype != torch.float32 or conv.weight.dtype != torch.float32 or isinstance(conv.padding, str):
        return nn.Conv3d.forward(conv, x)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)


def pointwise_float32(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """The 1x1x1 conv beside the latents in float32, whatever the weights or autocast say: raw latents reach +-10,
    where bfloat16 has steps of 1/16."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if conv.bias is None else conv.bias.float()
        return F.conv3d(x.float(), conv.weight.float(), bias)


def fold_time(x: Tensor) -> tuple[Tensor, int]:
    """(B, C, t, H, W) -> (B t, C, H, W), and B."""
    return x.transpose(1, 2).flatten(0, 1), x.shape[0]


def unfold_time(x: Tensor, batch: int) -> Tensor:
    """(B t, C, H, W) -> (B, C, t, H, W)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def split_frames(x: Tensor) -> Tensor:
    """(B, 2C, t, H, W) -> (B, C, 2t, H, W): the halves of the channels are neighbours in time."""
    return x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
