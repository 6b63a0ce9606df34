"""Wan2.1's causal video autoencoder: frames (B, 3, F, H, W) <-> raw latents (B, 16, T, H/8, W/8), F = 4 (T - 1) + 1.

The network and its key names are those of Wan-Video/Wan2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import Header, read_header
from lightx2v.latents import WAN21
from lightx2v.vae.layers import (
    AttentionBlock,
    CausalConv3d,
    Chain,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    RMSNorm,
    State,
    Upsample,
    convolve_wide,
)
from lightx2v.vae.layouts import PREFIXES, require_wan_layout
from lightx2v.vae.stream import OnChunk, decode, encode, fill

__all__ = [
    "AttentionBlock",
    "CausalConv3d",
    "OnChunk",
    "RMSNorm",
    "ResidualBlock",
    "State",
    "WanVAE",
    "WanVAEConfig",
    "config_from_header",
    "decode",
    "encode",
    "load",
]


@dataclass(frozen=True)
class WanVAEConfig:
    """Widths of the network: 96 and 16 are Wan2.1's own; LightVAE has 24 base channels."""

    base_channels: int = 96
    latent_channels: int = 16


def downsamples(base: int) -> Chain:
    """Base channels at full size to 4 times as many at an eighth of it and a quarter of the frames."""
    stages: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise((base, base, base * 2, base * 4, base * 4))):
        stages += [ResidualBlock(before, after), ResidualBlock(after, after)]
        if i < 3:
            stages.append(Downsample(after, time=i > 0))
    return Chain(*stages)


def upsamples(base: int) -> Chain:
    """4 times the base channels to base channels at 8 times the size and 4 times the frames."""
    # Each upsampling halves the width, so a stage starts with half of what the stage before ended with.
    widths = ((base * 4, base * 4), (base * 2, base * 4), (base * 2, base * 2), (base, base))
    stages: list[nn.Module] = []
    for i, (before, after) in enumerate(widths):
        stages += [ResidualBlock(before, after), ResidualBlock(after, after), ResidualBlock(after, after)]
        if i < 3:
            stages.append(Upsample(after, after // 2, time=i < 2))
    return Chain(*stages)


class WanVAE(nn.Module):
    """The network, with the key names of Wan2.1_VAE.pth.

    `posterior` and `reconstruct` are differentiable and take a whole clip (state None) or a chunk of one.
    """

    space = WAN21
    first_chunk = 1

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WanVAEConfig()
        z, base = config.latent_channels, config.base_channels
        self.encoder = Encoder((3, base, base * 4, z * 2), downsamples(base))
        self.conv1 = CausalConv3d(z * 2, z * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder((z, base * 4, base, 3), upsamples(base))

    def at_once(self, height: int, width: int) -> int:
        """Fewer keep a GPU waiting for launches."""
        return 2 if self.config.base_channels > 48 else 4

    def posterior(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, z, T, H/8, W/8) float32, of frames (B, 3, F, H, W) in [-1, 1].

        F is 4n + 1 for a whole clip or its first chunk, 4n for a later chunk.
        """
        return self.moments(self.encoder(self.prepare(frames), state))

    def to_latents(self, frames: Tensor, state: State | None = None) -> Tensor:
        """The mean of `posterior`."""
        return self.posterior(frames, state)[0]

    def prepare(self, frames: Tensor) -> Tensor:
        """What the encoder's first stage reads of frames."""
        return frames.contiguous(memory_format=torch.channels_last_3d)

    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance from what the encoder's last stage gives."""
        mean, log_variance = convolve_wide(self.conv1, hidden).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Frames (B, 3, F, H, W), not clamped to [-1, 1], of raw latents (B, z, T, h, w).

        F is 4T - 3 for a whole clip or its first chunk, 4T for a later chunk.
        """
        hidden = convolve_wide(self.conv2, raw).to(self.conv2.weight.dtype)
        return self.decoder(hidden.contiguous(memory_format=torch.channels_last_3d), state)


def config_from_header(header: Header) -> WanVAEConfig:
    """The widths of a checkpoint in the original or the diffusers layout.

    Raises CheckpointError, which says what the file is, for anything but a Wan2.1 VAE.
    """
    return WanVAEConfig(*require_wan_layout(header.without_prefix(*PREFIXES))[:2])


def load(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """Read a Wan2.1 VAE or LightVAE of any width: a .safetensors or .pth file, original or diffusers key names.

    Raises CheckpointError when the file is damaged or another kind of model.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    base, latent, rename = require_wan_layout(header)
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig(base, latent))
    return fill(vae, header, rename=rename, dtype=dtype, device=device)
