"""Wan2.2's causal video autoencoder, of TI2V-5B: frames (B, 3, F, H, W) <-> raw latents (B, 48, T, H/16, W/16),
F = 4 (T - 1) + 1.

Beside Wan2.1's: it reads frames as patches of 2x2 pixels, and each stage that halves or doubles adds a plain mean or
copy of what it got. The network and its key names are those of Wan-Video/Wan2.2, wan/modules/vae2_2.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from lightx2v.checkpoint import Header, read_header
from lightx2v.latents import WAN22
from lightx2v.vae.layers import (
    CausalConv3d,
    Chain,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    State,
    Upsample,
    convolve_wide,
    fold_time,
    unfold_time,
)
from lightx2v.vae.layouts import PREFIXES, require_wan22_layout
from lightx2v.vae.stream import fill


@dataclass(frozen=True)
class Wan22VAEConfig:
    """Widths of the network; the defaults are Wan2.2's own."""

    encoder_channels: int = 160
    decoder_channels: int = 256
    latent_channels: int = 48


class DownStage(nn.Module):
    """Two blocks; with `halve`, half the height and width (and with `time` the frames), and the mean beside it."""

    def __init__(self, channels: int, out_channels: int, *, halve: bool, time: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(channels, out_channels), ResidualBlock(out_channels, out_channels)]
        if halve:
            layers.append(Downsample(out_channels, time=time))
        self.downsamples = Chain(*layers)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        last = self.downsamples[-1]
        beside = average(x, time=last.time_conv is not None) if isinstance(last, Downsample) else x
        return self.downsamples(x, state) + beside


class UpStage(nn.Module):
    """Three blocks; with `double`, twice the height and width (and with `time` the frames), and a copy beside it."""

    def __init__(self, channels: int, out_channels: int, *, double: bool, time: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(channels, out_channels)]
        layers += [ResidualBlock(out_channels, out_channels) for _ in range(2)]
        if double:
            layers.append(Upsample(out_channels, out_channels, time=time))
        self.upsamples = Chain(*layers)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        last = self.upsamples[-1]
        if not isinstance(last, Upsample):
            return self.upsamples(x, state)
        starts = last.time_conv is not None and (state is None or last.time_conv not in state)
        made = self.upsamples(x, state)
        copy = duplicate(x, made.shape[1], time=last.time_conv is not None)
        return made + (copy[:, :, 1:] if starts else copy)  # the clip's first frame stays one frame


def average(x: Tensor, *, time: bool) -> Tensor:
    """Means over 2x2 positions: (B, C, t, H, W) -> (B, C, t, H/2, W/2).

    With `time` two frames become one with twice the channels, 2C; the clip's first frame is paired with zeros.
    """
    frames, batch = fold_time(x)
    x = unfold_time(F.avg_pool2d(frames, 2), batch)
    if not time:
        return x
    x = F.pad(x, (0, 0, 0, 0, x.shape[2] % 2, 0))
    return rearrange(x.movedim(1, -1), "b (t r) h w c -> b t h w (c r)", r=2).movedim(-1, 1)


def duplicate(x: Tensor, out_channels: int, *, time: bool) -> Tensor:
    """Every position four times, and with `time` every frame twice: (B, C, t, H, W) -> (B, out, t or 2t, 2H, 2W).

    Where C is twice out_channels, neighbouring channels become neighbouring rows instead of one channel twice.
    """
    rows = x.shape[1] // out_channels
    pattern = "b t h w (c a) -> b (t r) (h y a) (w z) c"
    return repeat(x.movedim(1, -1), pattern, a=rows, y=2 // rows, z=2, r=2 if time else 1).movedim(-1, 1)


class Wan22VAE(nn.Module):
    """The network, with the key names of Wan2.2_VAE.pth.

    `posterior` and `reconstruct` are differentiable and take a whole clip (state None) or a chunk of one.
    """

    space = WAN22
    first_chunk = 1

    def __init__(self, config: Wan22VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or Wan22VAEConfig()
        z, narrow, wide = config.latent_channels, config.encoder_channels, config.decoder_channels
        self.encoder = Encoder((12, narrow, narrow * 4, z * 2), downsamples(narrow))
        self.conv1 = CausalConv3d(z * 2, z * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder((z, wide * 4, wide, 12), upsamples(wide))

    def at_once(self, height: int, width: int) -> int:
        return 1

    def posterior(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, z, T, H/16, W/16) float32, of frames (B, 3, F, H, W).

        Frames are in [-1, 1]; F is 4n + 1 for a whole clip or its first chunk, 4n for a later chunk.
        """
        return self.moments(self.encoder(self.prepare(frames), state))

    def to_latents(self, frames: Tensor, state: State | None = None) -> Tensor:
        """The mean of `posterior`."""
        return self.posterior(frames, state)[0]

    def prepare(self, frames: Tensor) -> Tensor:
        """What the encoder's first stage reads of frames: (B, 12, F, H/2, W/2)."""
        patches = rearrange(frames, "b c f (h q) (w r) -> b (c r q) f h w", q=2, r=2)
        return patches.contiguous(memory_format=torch.channels_last_3d)

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance from what the encoder's last stage gives."""
        mean, log_variance = convolve_wide(self.conv1, hidden).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Frames (B, 3, F, 16h, 16w), not clamped to [-1, 1], of raw latents (B, z, T, h, w).

        F is 4T - 3 for a whole clip or its first chunk, 4T for a later chunk.
        """
        hidden = convolve_wide(self.conv2, raw).to(self.conv2.weight.dtype)
        patches = self.decoder(hidden.contiguous(memory_format=torch.channels_last_3d), state)
        return rearrange(patches, "b (c r q) f h w -> b c f (h q) (w r)", q=2, r=2)


def downsamples(base: int) -> Chain:
    """Base channels of patches to 4 times as many at an eighth of the size and a quarter of the frames."""
    return Chain(
        DownStage(base, base, halve=True, time=False),
        DownStage(base, base * 2, halve=True, time=True),
        DownStage(base * 2, base * 4, halve=True, time=True),
        DownStage(base * 4, base * 4, halve=False, time=False),
    )


def upsamples(base: int) -> Chain:
    """4 times the base channels to base channels at 8 times the size and 4 times the frames."""
    return Chain(
        UpStage(base * 4, base * 4, double=True, time=True),
        UpStage(base * 4, base * 4, double=True, time=True),
        UpStage(base * 4, base * 2, double=True, time=False),
        UpStage(base * 2, base, double=False, time=False),
    )


def config_from_header(header: Header) -> Wan22VAEConfig:
    """The widths of a checkpoint in the original or the diffusers layout.

    Raises CheckpointError, which says what the file is, for anything but a Wan2.2 VAE.
    """
    return Wan22VAEConfig(*require_wan22_layout(header.without_prefix(*PREFIXES))[:3])


def load(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> Wan22VAE:
    """Read a Wan2.2 VAE of any width: a .safetensors or .pth file, original or diffusers key names.

    Raises CheckpointError when the file is damaged or another kind of model.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    *widths, rename = require_wan22_layout(header)
    with torch.device("meta"):
        vae = Wan22VAE(Wan22VAEConfig(*widths))
    return fill(vae, header, rename=rename, dtype=dtype, device=device)
