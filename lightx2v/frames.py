"""Pictures as the first and last frames of a video: brought to its size, encoded, and as ComfyUI's CONDITIONING carries
them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.latents import LatentFormat
from lightx2v.shapes import LatentShape, VideoShape, to_latent, to_video


class Encode(Protocol):
    """How a VAE encodes a clip of which only the ends are given: raw latents (1, C, T, h, w) of `num_frames` = 4n + 1
    frames, (1, 3, S, H, W) `start`, grey (0), (1, 3, E, H, W) `end`, in [-1, 1]; at least one of the two is given.

    `partial(encode_padded, vae)` of lightx2v/vae/padded.py is one; `whole_clips` makes one of any VAE.
    """

    def __call__(self, num_frames: int, *, start: Tensor | None, end: Tensor | None) -> Tensor: ...


def whole_clips(encode: Callable[[Tensor], Tensor]) -> Encode:
    """Of a VAE that encodes clips (1, 3, F, H, W) as they are: the grey frames are made, and encoded like the rest."""

    def padded(num_frames: int, *, start: Tensor | None, end: Tensor | None) -> Tensor:
        given = [frames for frames in (start, end) if frames is not None]
        clip = given[0].new_zeros(1, 3, num_frames, *given[0].shape[3:])
        if start is not None:
            clip[:, :, : start.shape[2]] = start
        if end is not None:
            clip[:, :, num_frames - end.shape[2] :] = end
        return encode(clip)

    return padded


@dataclass(frozen=True)
class ImageCondition:
    """The given frames of one video.

    latents: (1, C, T, h, w) raw VAE space, of the clip with grey, or zeros, where nothing is given.
    mask: (1, 4, T, h, w), 1 where a frame is given, or (1, 1, T, h, w) where only whole latent frames are.
    """

    latents: Tensor
    mask: Tensor

    @property
    def concat_mask(self) -> Tensor:
        """The mask as ComfyUI carries it: 0 where given; (1, 1, T, h, w) where whole latent frames are, as
        WanImageToVideo writes it, else (1, 4, T, h, w), as WanFirstLastFrameToVideo does."""
        whole = bool((self.mask == self.mask[:, :1]).all())
        return 1 - (self.mask[:, :1] if whole else self.mask)


def encode_ends(
    encode: Encode, video: VideoShape, space: LatentFormat, first: Tensor | None, last: Tensor | None
) -> Tensor:
    """Raw latents (1, C, T, h, w) of a video that begins with frames (F', H', W', 3) `first` and ends with `last`.

    Raises ValueError where neither is given, and for a VAE of another latent space.
    """
    start, end = (
        fit_frames(frames, video.height, video.width) if frames is not None and len(frames) else None
        for frames in (first, last)
    )
    if start is None and end is None:
        raise ValueError("neither a start nor an end image is given; give one of them")
    latents = encode(video.num_frames, start=start, end=end).float()
    expected = (1, space.channels, *to_latent(video, space.stride))
    if tuple(latents.shape) != expected:
        raise ValueError(
            f"the VAE made latents {tuple(latents.shape)} of {video.num_frames} frames of {video.width}x{video.height} "
            f"pixels; expected {expected}: connect the VAE that belongs to the model"
        )
    return latents


def require_image(image: Tensor) -> Tensor:
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"the image is {tuple(image.shape)}; expected (frames, H, W, 3), RGB in [0, 1]")
    return image


def fit_frames(image: Tensor, height: int, width: int) -> Tensor:
    """Frames (F, H', W', 3) in [0, 1], with alpha dropped if any -> (1, 3, F, height, width) in [-1, 1].

    Cut at both sides to the new proportions, then resized bilinearly, as ComfyUI's Wan nodes do.
    """
    pixels = require_image(image)[..., :3].movedim(-1, 1).float()
    return cover(pixels, height, width).movedim(0, 1)[None] * 2 - 1


def as_cut(image: Tensor, video: VideoShape) -> Tensor:
    """Pictures (F, H', W', 3) in [0, 1] -> (F, H, W, 3): as they stand in a video of that size."""
    return (fit_frames(image, video.height, video.width)[0].movedim(0, -1) + 1) / 2


def cover(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, H, W) -> (N, C, height, width): cut centrally to the new proportions, then resized bilinearly.

    The margins are rounded as in ComfyUI's common_upscale (comfy/utils.py), or pictures would be shifted by a pixel.
    """
    old, new = x.shape[-1] / x.shape[-2], width / height
    top = _margin(x.shape[-2], old / new) if old < new else 0
    left = _margin(x.shape[-1], new / old) if old > new else 0
    x = x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]
    return x if x.shape[-2:] == (height, width) else F.interpolate(x, size=(height, width), mode="bilinear")


def _margin(side: int, share: float) -> int:
    """Cells to cut at either end of a side so that `share` of it remains, and at least one cell."""
    return min(round((side - side * share) / 2), (side - 1) // 2)


def image_latents(concat_latent_image: Tensor, space: LatentFormat, shape: Sequence[int]) -> Tensor:
    """concat_latent_image (B', C, T, h', w') raw VAE space -> model space, in the `shape` (B, C, T, h, w)."""
    t, (height, width) = shape[2], shape[3:]
    require_given(concat_latent_image, "concat_latent_image", (space.channels,), t, space)
    if concat_latent_image.shape[2] != t:
        frames = [to_video(LatentShape(n, 1, 1), space.stride).num_frames for n in (concat_latent_image.shape[2], t)]
        raise ValueError(
            f"concat_latent_image has {concat_latent_image.shape[2]} latent frames ({frames[0]} frames), the video has "
            f"{t} ({frames[1]}); set the same length where the image is encoded and where the video is made"
        )
    return spread(space.normalize(resized(concat_latent_image.float(), height, width)), shape[0])


def given_cells(concat_mask: Tensor | None, space: LatentFormat, shape: Sequence[int]) -> Tensor:
    """concat_mask (B', 1 or 4, T', h', w'), 0 where given, or None -> (B', 1 or 4, T, h, w), 1 where given."""
    _, _, t, height, width = shape
    if concat_mask is None:
        return torch.zeros(1, 1, t, height, width)
    require_given(concat_mask, "concat_mask", (1, space.stride[0]), t, space)
    given = resized(1 - concat_mask.float(), height, width)
    return F.pad(given, (0, 0, 0, 0, 0, t - given.shape[2]))


def require_given(value: Tensor, name: str, channels: tuple[int, ...], t: int, space: LatentFormat) -> None:
    longer = name == "concat_mask" and value.ndim == 5 and value.shape[2] > t
    if value.ndim != 5 or value.shape[1] not in channels or 0 in value.shape or longer:
        raise ValueError(
            f"{name} is {tuple(value.shape)}; expected (B, {' or '.join(map(str, channels))}, {t}, h, w): make it with "
            f"the VAE of the model's {space.channels}-channel latent space, at the video's length"
        )


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, T, h, w) -> (B, C, T, height, width), frame by frame."""
    frames = x.movedim(2, 1)  # (B, T, C, h, w)
    return cover(frames.flatten(0, 1), height, width).unflatten(0, frames.shape[:2]).movedim(1, 2)


def spread(x: Tensor, batch: int) -> Tensor:
    """The entries of a batch over another batch size: repeated in runs, or picked evenly from first to last
    (comfy/utils.py, resize_to_batch_size)."""
    count = len(x)
    if count < batch:
        picks = [min(math.floor((index + 0.5) * count / batch), count - 1) for index in range(batch)]
    else:
        picks = [round(index * (count - 1) / max(batch - 1, 1)) for index in range(batch)]
    return x if count == batch else x[picks]
