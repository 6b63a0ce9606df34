"""Cheap previews, every few frames, as a looping picture: a linear map from latent channels to colour, or a tiny
autoencoder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from lightx2v import strict_json
from lightx2v.checkpoint import CheckpointError, Header
from lightx2v.vae.stream import decode
from lightx2v.vae.tae import TinyVAE

MAX_FRAMES = 12
# By a tiny autoencoder: at 832x480 so many take 0.9 % of the arithmetic of one pass of the smallest Wan, 12 take 2.2 %.
TINY_FRAMES = 5
COLOURS_KEY = "latent_colours"  # in a transformer's metadata, for models whose latents are not Wan's own


@dataclass(frozen=True)
class Colours:
    """How latents of model space look: about [-1, 1] of red, green and blue."""

    factors: Sequence[Sequence[float]]  # (C, 3)
    bias: Sequence[float]  # (3,)

    def to_metadata(self) -> dict[str, str]:
        return {COLOURS_KEY: json.dumps([*self.factors, self.bias])}


def read_colours(header: Header, channels: int) -> Colours | None:
    """The colours that a checkpoint brings for its own latents, if it does; CheckpointError if they cannot be read."""
    if COLOURS_KEY not in header.metadata:
        return None
    try:
        *factors, bias = strict_json.parse(header.metadata[COLOURS_KEY])
        rows = [[float(value) for value in row] for row in (*factors, bias)]
        if len(rows) != channels + 1 or any(len(row) != 3 for row in rows):
            raise ValueError(f"{len(rows)} rows")
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{header.path}: its metadata '{COLOURS_KEY}' is not {channels + 1} rows of 3 numbers ({error}); "
            "download the file again"
        ) from error
    return Colours(rows[:-1], rows[-1])


def latent_to_rgb(x0: Tensor, colours: Colours, max_frames: int = MAX_FRAMES) -> Tensor:
    """x0 (B, C, T, H, W) in model space -> (F, H, W, 3) uint8 of the first video, F = at most max_frames of its T."""
    picked = torch.linspace(0, x0.shape[2] - 1, min(max_frames, x0.shape[2])).round().long()
    latents = x0[0][:, picked.to(x0.device)].float()
    weight = torch.tensor(colours.factors, dtype=torch.float32, device=x0.device)
    rgb = torch.einsum("cthw,cr->thwr", latents, weight) + torch.tensor(colours.bias, device=x0.device)
    return ((rgb + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def tiny_to_rgb(x0: Tensor, tae: TinyVAE, max_frames: int = TINY_FRAMES) -> Tensor:
    """The same with a tiny autoencoder, at the video's own size: (F, H, W, 3) uint8, F = at most max_frames of its T.

    Only the latent frames that are shown are decoded, as if they followed each other; of each its last frame is shown.
    """
    picked = torch.linspace(0, x0.shape[2] - 1, min(max_frames, x0.shape[2])).round().long()
    frames = decode(tae, tae.space.denormalize(x0[:1, :, picked.to(x0.device)]))[0, :, ::4]
    return ((frames.movedim(0, -1) + 1) * 127.5).round().to(torch.uint8).cpu()


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
