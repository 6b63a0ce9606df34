"""Cheap previews: a linear map from latent channels to colour, every few frames, as a looping picture."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

MAX_FRAMES = 12


def latent_to_rgb(
    x0: Tensor, factors: Sequence[Sequence[float]], bias: Sequence[float], max_frames: int = MAX_FRAMES
) -> Tensor:
    """x0 (B, C, T, H, W) in model space -> (F, H, W, 3) uint8 of the first video, F = at most max_frames of its T.

    factors: (C, 3), bias: (3,), fitted so that the result is about [-1, 1].
    """
    picked = torch.linspace(0, x0.shape[2] - 1, min(max_frames, x0.shape[2])).round().long()
    latents = x0[0][:, picked.to(x0.device)].float()
    weight = torch.tensor(factors, dtype=torch.float32, device=x0.device)
    rgb = torch.einsum("cthw,cr->thwr", latents, weight) + torch.tensor(bias, device=x0.device)
    return ((rgb + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


class LoopingPicture:
    """Several frames where a host expects one picture: it saves itself as an animated PNG, which browsers play."""

    def __init__(self, frames: Tensor, width: int, milliseconds: int = 120) -> None:
        """frames: (F, H, W, 3) uint8; width: pixels to scale to; milliseconds: each frame stays."""
        height = max(1, round(width * frames.shape[1] / frames.shape[2]))
        self.size = (width, height)
        self._milliseconds = milliseconds
        self._frames = [Image.fromarray(f.numpy()).resize(self.size, Image.Resampling.BILINEAR) for f in frames]

    def save(self, file: BinaryIO, format: str, **options: Any) -> None:
        first, *rest = self._frames
        first.save(
            file,
            format="PNG",
            save_all=True,
            append_images=rest,
            duration=self._milliseconds,
            loop=0,
            compress_level=options.get("compress_level", 1),
        )
