"""The stages of one video over the parts of a model: text and images to conditioning, latents to frames."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lightx2v.config import Request
from lightx2v.decoding import Decoding, decode_video
from lightx2v.diffuse import Hooks, Start
from lightx2v.frames import Encode, as_cut, whole_clips
from lightx2v.guidance import Conditioning
from lightx2v.media import to_frames
from lightx2v.models import ModelSpec
from lightx2v.models.wan.conditioning import image_latent
from lightx2v.parts import Parts
from lightx2v.sampling import Step
from lightx2v.shapes import VideoShape, to_latent
from lightx2v.vae import stream
from lightx2v.vae.hunyuan15 import HunyuanVAE
from lightx2v.vae.padded import encode_padded


def encode(
    parts: Parts, spec: ModelSpec, request: Request, start: Tensor | None, end: Tensor | None
) -> tuple[Conditioning, Conditioning | None, Start]:
    """Text and images to conditioning, and to the latents that sampling begins with.

    start, end: pictures (1, H, W, 3) of the first and of the last frame.
    """
    with parts.visiting(parts.text_encoder().model):
        cond = parts.text_encoder().condition(request.prompt)
        uncond = parts.text_encoder().condition(request.negative_prompt) if request.sampling.guided else None
    video = VideoShape(request.num_frames, request.height, request.width)
    begin = Start(torch.zeros(1, spec.latents.channels, *to_latent(video, spec.latents.stride)))
    image = clip = None
    given = [picture for picture in (start, end) if picture is not None]
    if spec.reads_clip and given:
        with parts.visiting(parts.image_encoder().model):
            shown = [as_cut(picture, video) for picture in given] if spec.shows_cut else given
            clip = torch.cat([parts.image_encoder().encode(picture) for picture in shown], 1).cpu()
    if spec.image_input is not None:
        shape = begin.latents.shape
        encoded = spec.image_input.condition(_padded(parts), video, spec.latents, start=start, end=end)
        image = spec.image_input.channels(encoded.latents.cpu(), encoded.concat_mask.cpu(), spec.latents, shape)
    elif spec.keeps_frames and start is not None:
        begin = Start(*image_latent(_padded(parts), video, spec.latents, start))
    seen = replace(cond, image=image, clip=clip)
    return seen, None if uncond is None else replace(uncond, image=image, clip=clip), begin


def _padded(parts: Parts) -> Encode:
    """How the model's VAE encodes the ends of a clip; it is read when it first has to."""

    def run(num_frames: int, *, start: Tensor | None, end: Tensor | None) -> Tensor:
        vae = parts.vae()
        first, last = (None if frames is None else frames.to(parts.device) for frames in (start, end))
        if isinstance(vae, HunyuanVAE):  # its networks look at all frames at once: nothing of it repeats
            return whole_clips(partial(stream.encode, vae))(num_frames, start=first, end=last)
        return encode_padded(vae, num_frames, start=first, end=last)

    return run


def decode(parts: Parts, latents: Tensor, how: Decoding, progress: bool) -> Tensor:
    """Latents to (F, H, W, 3) float32 in [0, 1] on the CPU."""
    info, vae = parts.decoder()
    return to_frames(decode_video(info, vae, latents, how, free=parts.free_bytes(), progress=progress))


def ticker(progress: bool, on_step: Callable[[Step, Tensor], None] | None) -> Hooks:
    """A progress bar over the steps, with time left, that also calls the caller's hook."""
    bar = tqdm(desc="sample", unit="step", disable=not progress)

    def tick(step: Step, x0: Tensor) -> None:
        bar.total = step.total
        bar.update()
        if step.index + 1 == step.total:
            bar.close()
        if on_step is not None:
            on_step(step, x0)

    return Hooks(on_step=tick)
