"""Latent spaces: what a VAE writes (raw) and what a transformer reads (normalised), and the map between them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentFormat:
    """A VAE's latent space. Raw latents travel between nodes; normalised ones live only inside the sampler."""

    channels: int
    stride: tuple[int, int, int]  # pixels per latent cell along (T, H, W); T is causal: F = stride * (T - 1) + 1
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.ndim != 5 or like.shape[1] != self.channels:
            raise ValueError(f"latents are {tuple(like.shape)}; expected (B, {self.channels}, T, H, W)")
        shape = (1, self.channels, 1, 1, 1)
        mean = torch.tensor(self.mean, dtype=torch.float32, device=like.device).view(shape)
        std = torch.tensor(self.std, dtype=torch.float32, device=like.device).view(shape)
        return mean, std

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw VAE latents (B, C, T, H, W) -> model space, float32."""
        mean, std = self._statistics(raw)
        return (raw.float() - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Model-space latents (B, C, T, H, W) -> raw VAE latents, float32."""
        mean, std = self._statistics(latents)
        return latents.float() * std + mean


# Per-channel statistics of the Wan2.1 VAE, from Wan2.1 wan/modules/vae.py (also used by Wan2.2 A14B).
WAN21 = LatentFormat(
    channels=16,
    stride=(4, 8, 8),
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)  # fmt: skip
