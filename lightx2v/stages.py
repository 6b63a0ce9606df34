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
from lightx2v.offload.shortage import once_there_is_room, says_if_lost
from lightx2v.parts import Parts
from lightx2v.sampling import Step
from lightx2v.shapes import VideoShape, to_latent
from lightx2v.vae import stream
from lightx2v.vae.hunyuan15 import HunyuanVAE
from lightx2v.vae.padded import encode_padded

Encoded = tuple[Conditioning, Conditioning | None, Start]


@says_if_lost
def encode(parts: Parts, spec: ModelSpec, request: Request, start: Tensor | None, end: Tensor | None) -> Encoded:
    """Text and images to conditioning, and to the latents that sampling begins with.

    start, end: pictures (1, H, W, 3) of the first and of the last frame.
    """
    text, prompts = parts.text_encoder(), [request.prompt]
    prompts += [request.negative_prompt] if request.sampling.guided else []
    cond, *rest = parts.visit(text.model, lambda: [text.condition(prompt) for prompt in prompts])
    uncond = rest[0] if rest else None
    video = VideoShape(request.num_frames, request.height, request.width)
    begin = Start(torch.zeros(1, spec.latents.channels, *to_latent(video, spec.latents.stride)))
    image = clip = None
    given = [picture for picture in (start, end) if picture is not None]
    if spec.reads_clip and given:
        sees, shown = parts.image_encoder(), [as_cut(picture, video) for picture in given] if spec.shows_cut else given
        clip = parts.visit(sees.model, lambda: torch.cat([sees.encode(picture) for picture in shown], 1).cpu())
    if spec.image_input is not None:
        shape = begin.latents.shape
        known = spec.image_input.condition(_padded(parts), video, spec.latents, start=start, end=end)
        image = spec.image_input.channels(known.latents.cpu(), known.concat_mask.cpu(), spec.latents, shape)
    elif spec.keeps_frames and start is not None:
        begin = Start(*image_latent(_padded(parts), video, spec.latents, start))
    seen = replace(cond, image=image, clip=clip)
    return seen, None if uncond is None else replace(uncond, image=image, clip=clip), begin


def _padded(parts: Parts) -> Encode:
    """How the model's VAE encodes the ends of a clip; it is read when it first has to."""

    def run(num_frames: int, *, start: Tensor | None, end: Tensor | None) -> Tensor:
        def encoded() -> Tensor:
            vae = parts.vae()
            first, last = (None if frames is None else frames.to(parts.device) for frames in (start, end))
            if isinstance(vae, HunyuanVAE):  # its networks look at all frames at once: nothing of it repeats
                return whole_clips(partial(stream.encode, vae))(num_frames, start=first, end=last)
            return encode_padded(vae, num_frames, start=first, end=last)

        return once_there_is_room(encoded, parts.clear_transformers, "encoding the image")

    return run


@says_if_lost
def decode(parts: Parts, latents: Tensor, how: Decoding, progress: bool) -> Tensor:
    """Latents to (F, H, W, 3) float32 in [0, 1] on the CPU."""
    info, vae = parts.decoder()
    frames = decode_video(
        info, vae, latents, how, free=parts.room_bytes(), progress=progress, make_room=parts.clear_transformers
    )
    return to_frames(frames)


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
