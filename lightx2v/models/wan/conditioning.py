"""What an image-to-video model is given of its first and last frames.

Wan2.1 I2V, FLF2V and Wan2.2 I2V-A14B read 20 channels beside the 16 noisy ones: a mask of 4, then 16 image latents
(Wan-Video/Wan2.1 and Wan2.2, wan/image2video.py). The latents are those of the whole clip with the given frames in
place and the others grey. The mask has a channel for each of the 4 frames that share a latent frame, 1 where that frame
is given; the clip's first frame, which is alone in its latent frame, counts four times.

ComfyUI carries the same in a CONDITIONING as `concat_latent_image` (raw VAE space, not normalised) and `concat_mask`
(the other way round: 0 where given), and turns and normalises them where its sampler begins (comfy/model_base.py,
WAN21.concat_cond); `to_model_input` is that step.

TI2V-5B has no further channels: its latent starts with the image's own latents, and a noise mask keeps them.
"""

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

    latents: (1, 16, T, h, w) raw VAE space, of the clip with grey where nothing is given.
    mask: (1, 4, T, h, w), 1 where a frame is given.
    """

    latents: Tensor
    mask: Tensor

    @property
    def concat_mask(self) -> Tensor:
        """The mask as ComfyUI carries it: 0 where given; (1, 1, T, h, w) where whole latent frames are, as
        WanImageToVideo writes it, else (1, 4, T, h, w), as WanFirstLastFrameToVideo does."""
        whole = bool((self.mask == self.mask[:, :1]).all())
        return 1 - (self.mask[:, :1] if whole else self.mask)


def image_condition(
    encode: Encode, video: VideoShape, space: LatentFormat, *, start: Tensor | None = None, end: Tensor | None = None
) -> ImageCondition:
    """Encode the frames that a video starts and ends with.

    video: its size; F = 4n + 1.
    start, end: (F', H', W', 3), RGB in [0, 1], of any size and usually one frame; at least one of the two. Frames
        beyond the length of the video are left out, and of `start` those that `end` stands on.
    Raises ValueError for frames that are no images, for none at all, and for a VAE of another latent space.
    """
    last = None if end is None else _require_image(end)[-video.num_frames :]
    room = video.num_frames - (0 if last is None else len(last))
    first = None if start is None else _require_image(start)[:room]
    latents = _encoded(encode, video, space, first, last)
    mask = given_mask(
        to_latent(video, space.stride),
        0 if first is None else len(first),
        0 if last is None else len(last),
        stride=space.stride[0],
    )
    return ImageCondition(latents, mask.to(latents.device))


def image_latent(
    encode: Encode, video: VideoShape, space: LatentFormat, start: Tensor | None, *, batch: int = 1
) -> tuple[Tensor, Tensor | None]:
    """What TI2V-5B starts from: raw latents (batch, 48, T, h, w), and what to keep (batch, 1, T, h, w), 0 = keep.

    Without an image the latent is empty (zeros) and nothing is kept (None). With one, its latents stand first and the
    rest is the space's mean, which is zero to the model (comfy_extras/nodes_wan.py, Wan22ImageToVideoLatent). Of
    several frames the first 4n + 1 are used.
    Raises as `image_condition` does.
    """
    latent = to_latent(video, space.stride)
    empty = torch.zeros(1, space.channels, *latent)
    if start is None:
        return empty.repeat(batch, 1, 1, 1, 1), None
    stride = space.stride[0]
    count = (min(len(_require_image(start)), video.num_frames) - 1) // stride * stride + 1
    given = _encoded(encode, VideoShape(count, video.height, video.width), space, start[:count], None).cpu()
    raw = space.denormalize(empty)
    raw[:, :, : given.shape[2]] = given
    mask = torch.ones(1, 1, *latent)
    mask[:, :, : given.shape[2]] = 0
    return raw.repeat(batch, 1, 1, 1, 1), mask.repeat(batch, 1, 1, 1, 1)


def _encoded(
    encode: Encode, video: VideoShape, space: LatentFormat, first: Tensor | None, last: Tensor | None
) -> Tensor:
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


def _require_image(image: Tensor) -> Tensor:
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"the image is {tuple(image.shape)}; expected (frames, H, W, 3), RGB in [0, 1]")
    return image


def fit_frames(image: Tensor, height: int, width: int) -> Tensor:
    """Frames (F, H', W', 3) in [0, 1], with alpha dropped if any -> (1, 3, F, height, width) in [-1, 1].

    Cut at both sides to the new proportions, then resized bilinearly, as ComfyUI's Wan nodes do.
    """
    pixels = _require_image(image)[..., :3].movedim(-1, 1).float()
    return cover(pixels, height, width).movedim(0, 1)[None] * 2 - 1


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


def given_mask(latent: LatentShape, start: int, end: int = 0, *, stride: int = 4) -> Tensor:
    """(1, stride, T, h, w), 1 for each frame that is given: the first `start` of the video, the last `end`.

    With no last frames, latent frames are given as a whole or not at all: 1 to 4 frames give the first one, 5 to 8 the
    first two (ComfyUI's WanImageToVideo); with last ones each frame counts by itself (WanFirstLastFrameToVideo).
    """
    slots = torch.zeros(latent.t * stride)
    if end:
        slots[: start + stride - 1 if start else 0] = 1
        slots[-end:] = 1
    elif start:
        slots[: ((start - 1) // stride + 1) * stride] = 1
    return slots.view(latent.t, stride).T[None, :, :, None, None].repeat(1, 1, 1, latent.h, latent.w)


def to_model_input(
    concat_latent_image: Tensor | None, concat_mask: Tensor | None, space: LatentFormat, shape: Sequence[int]
) -> Tensor:
    """What stands behind the noisy latents of an image-to-video model: (B, 4 + C, T, h, w) float32, model space.

    concat_latent_image: (B', C, T, h', w') raw VAE space; None gives zeros throughout, which is "nothing is given".
    concat_mask: (B', 1 or 4, T', h', w'), 0 where given; None is "nothing is given" too. Where the conditioning has no
        concat_mask but the latent a noise mask, ComfyUI takes that: it belongs to the caller to hand it over.
    shape: of the noisy latents, (B, C, T, h, w).
    Like ComfyUI (comfy/model_base.py, WAN21.concat_cond): another height and width is cut and resized, a mask with
    fewer latent frames goes on as "to generate", another batch is spread over the latents'. The mask comes first.
    Raises ValueError for other channels and latent frames.
    """
    batch, _, t, height, width = shape
    if concat_latent_image is None:
        return torch.zeros(batch, space.stride[0] + space.channels, t, height, width)
    _require(concat_latent_image, "concat_latent_image", (space.channels,), t, space)
    if concat_latent_image.shape[2] != t:
        frames = [to_video(LatentShape(n, 1, 1), space.stride).num_frames for n in (concat_latent_image.shape[2], t)]
        raise ValueError(
            f"concat_latent_image has {concat_latent_image.shape[2]} latent frames ({frames[0]} frames), the video has "
            f"{t} ({frames[1]}); set the same length where the image is encoded and where the video is made"
        )
    latents = _spread(space.normalize(_resized(concat_latent_image.float(), height, width)), batch)
    given = latents.new_zeros(1, 1, t, height, width)
    if concat_mask is not None:
        _require(concat_mask, "concat_mask", (1, space.stride[0]), t, space)
        given = _resized(1 - concat_mask.to(latents), height, width)
        given = F.pad(given, (0, 0, 0, 0, 0, t - given.shape[2]))
    given = given.expand(-1, space.stride[0], -1, -1, -1)
    return torch.cat([_spread(given, batch), latents], 1)


def _require(value: Tensor, name: str, channels: tuple[int, ...], t: int, space: LatentFormat) -> None:
    longer = name == "concat_mask" and value.ndim == 5 and value.shape[2] > t
    if value.ndim != 5 or value.shape[1] not in channels or 0 in value.shape or longer:
        raise ValueError(
            f"{name} is {tuple(value.shape)}; expected (B, {' or '.join(map(str, channels))}, {t}, h, w): make it with "
            f"the VAE of the model's {space.channels}-channel latent space, at the video's length"
        )


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, T, h, w) -> (B, C, T, height, width), frame by frame."""
    frames = x.movedim(2, 1)  # (B, T, C, h, w)
    return cover(frames.flatten(0, 1), height, width).unflatten(0, frames.shape[:2]).movedim(1, 2)


def _spread(x: Tensor, batch: int) -> Tensor:
    """The entries of a batch over another batch size: repeated in runs, or picked evenly from first to last
    (comfy/utils.py, resize_to_batch_size)."""
    count = len(x)
    if count < batch:
        picks = [min(math.floor((index + 0.5) * count / batch), count - 1) for index in range(batch)]
    else:
        picks = [round(index * (count - 1) / max(batch - 1, 1)) for index in range(batch)]
    return x if count == batch else x[picks]
