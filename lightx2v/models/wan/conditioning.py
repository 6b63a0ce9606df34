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

from collections.abc import Sequence

import torch
from torch import Tensor

from lightx2v.frames import (
    Encode,
    ImageCondition,
    encode_ends,
    given_cells,
    image_latents,
    require_image,
    spread,
)
from lightx2v.latents import LatentFormat
from lightx2v.shapes import LatentShape, VideoShape, to_latent


def image_condition(
    encode: Encode, video: VideoShape, space: LatentFormat, *, start: Tensor | None = None, end: Tensor | None = None
) -> ImageCondition:
    """Encode the frames that a video starts and ends with.

    video: its size; F = 4n + 1.
    start, end: (F', H', W', 3), RGB in [0, 1], of any size and usually one frame; at least one of the two. Frames
        beyond the length of the video are left out, and of `start` those that `end` stands on.
    Raises ValueError for frames that are no images, for none at all, and for a VAE of another latent space.
    """
    last = None if end is None else require_image(end)[-video.num_frames :]
    room = video.num_frames - (0 if last is None else len(last))
    first = None if start is None else require_image(start)[:room]
    latents = encode_ends(encode, video, space, first, last)
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
    count = (min(len(require_image(start)), video.num_frames) - 1) // stride * stride + 1
    given = encode_ends(encode, VideoShape(count, video.height, video.width), space, start[:count], None).cpu()
    raw = space.denormalize(empty)
    raw[:, :, : given.shape[2]] = given
    mask = torch.ones(1, 1, *latent)
    mask[:, :, : given.shape[2]] = 0
    return raw.repeat(batch, 1, 1, 1, 1), mask.repeat(batch, 1, 1, 1, 1)


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
    latents = image_latents(concat_latent_image, space, shape)
    given = given_cells(concat_mask, space, shape).to(latents).expand(-1, space.stride[0], -1, -1, -1)
    return torch.cat([spread(given, batch), latents], 1)
