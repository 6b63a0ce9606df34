"""What a HunyuanVideo-1.5 transformer is told beside the noisy latents.

Behind their 32 channels it reads 32 of the given frames, then one that is 1 where a frame is given
(Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/pipelines/hunyuan_video_pipeline.py). Where nothing is given all of them are
zeros, not a grey clip as of Wan; text-to-video is nothing given at all. ComfyUI carries the same in a CONDITIONING, as
lightx2v/models/wan/conditioning.py tells, and puts it together like `to_model_input` (comfy/model_base.py,
HunyuanVideo15.concat_cond).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightx2v import guidance
from lightx2v.frames import Encode, ImageCondition, encode_ends, given_cells, image_latents, require_image, spread
from lightx2v.latents import LatentFormat
from lightx2v.models.hunyuan_video_15.transformer import Conditioning
from lightx2v.shapes import VideoShape, to_latent


def arguments(cond: guidance.Conditioning, step_end: float, *, reads_step_end: bool = False) -> Mapping[str, Any]:
    """What the transformer is called with. step_end: the timestep in [0, 1000] that the step goes to."""
    asked = Conditioning(cond.context, cond.mask, cond.glyphs, image=cond.clip)
    batch, device = cond.context.shape[0], cond.context.device
    end = torch.full((batch,), step_end, dtype=torch.float32, device=device) if reads_step_end else None
    return {"context": asked, "image": cond.image, "step_end": end}


def image_condition(
    encode: Encode, video: VideoShape, space: LatentFormat, *, start: Tensor | None = None, end: Tensor | None = None
) -> ImageCondition:
    """Encode the frames that a video starts with.

    video: its size; F = 4n + 1. start: (F', H', W', 3), RGB in [0, 1], of any size and usually one frame; of several
        the first 4n + 1 are used. Without any, nothing is given.
    Raises ValueError for last frames, which this model cannot be given, and for a VAE of another latent space.
    """
    if end is not None:
        raise ValueError("HunyuanVideo-1.5 can start from an image but not end on one: leave the end image out")
    shape, stride = (1, space.channels, *to_latent(video, space.stride)), space.stride[0]
    if start is None:
        return ImageCondition(torch.zeros(shape), torch.zeros(1, 1, *shape[2:]))
    count = (min(len(require_image(start)), video.num_frames) - 1) // stride * stride + 1
    given = encode_ends(encode, VideoShape(count, video.height, video.width), space, start[:count], None)
    latents, mask = given.new_zeros(shape), given.new_zeros(1, 1, *shape[2:])
    latents[:, :, : given.shape[2]] = given
    mask[:, :, : given.shape[2]] = 1
    return ImageCondition(latents, mask)


def to_model_input(
    concat_latent_image: Tensor | None, concat_mask: Tensor | None, space: LatentFormat, shape: Sequence[int]
) -> Tensor:
    """What stands behind the noisy latents: (B, C + 1, T, h, w) float32, model space; see Wan's for the arguments."""
    given = spread(given_cells(concat_mask, space, shape)[:, :1], shape[0])
    if concat_latent_image is None:
        return torch.cat([torch.zeros(*shape).to(given), given], 1)
    latents = image_latents(concat_latent_image, space, shape)
    return torch.cat([latents, given.to(latents)], 1)
