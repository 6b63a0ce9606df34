"""The stages of one video over the parts of a model: text and images to conditioning, latents to frames."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightx2v.config import Request
from lightx2v.decoding import Decoding, decode_video
from lightx2v.diffuse import Hooks, Start
from lightx2v.frames import Encode, as_cut, whole_clips
from lightx2v.guidance import Conditioning
from lightx2v.identify import CheckpointInfo
from lightx2v.media import require_writable, save_video, to_frames
from lightx2v.models import ModelSpec
from lightx2v.models.wan.conditioning import image_latent
from lightx2v.offload.shortage import once_there_is_room, says_if_lost
from lightx2v.parallel.agreement import on_first, only_on_first, together
from lightx2v.parallel.decoding import decode_video as decode_together
from lightx2v.parallel.mesh import Mesh
from lightx2v.parts import Parts
from lightx2v.request import Call
from lightx2v.sampling import Step
from lightx2v.shapes import VideoShape, to_latent
from lightx2v.vae import stream
from lightx2v.vae.hunyuan15 import HunyuanVAE
from lightx2v.vae.loading import VAE, VAEInfo
from lightx2v.vae.padded import encode_padded

Encoded = tuple[Conditioning, Conditioning | None, Start]
Prepared = tuple[Request, Encoded]


def prepare(parts: Parts, info: CheckpointInfo, called: Call, before: Request, target: str | Path | None) -> Prepared:
    """The request that `called` makes of the one before, at the size of its pictures, and what it becomes, encoded.

    target: where the video is to be written, None: nowhere. Of several processes rank 0 alone reads and encodes, and
    its own arguments count. Raises, before anything is encoded, as `Call.of` and `require_writable` do.
    """

    def work() -> Prepared:
        request, (start, end) = called.of(before, info)
        if target is not None:
            require_writable(target, request.width, request.height)
        return request, encode(parts, info.spec, request, start, end)

    return on_first(parts.mesh, work)


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
def decode(parts: Parts, latents: Tensor, how: Decoding, progress: bool) -> Tensor | None:
    """Latents to (F, H, W, 3) float32 in [0, 1] on the CPU; of several processes on rank 0, None elsewhere.

    Several processes decode together, each some rows of every frame.
    """
    if parts.mesh is None:
        info, vae = parts.decoder()
        room, free = parts.clear_transformers, parts.room_bytes()
        return to_frames(decode_video(info, vae, latents, how, free=free, progress=progress, make_room=room))
    read: list[tuple[VAEInfo, VAE]] = []
    together(parts.mesh, lambda: read.append(parts.decoder()))
    info, vae = read[0]
    frames = decode_together(parts.mesh, info, vae, latents, how, free=parts.room_bytes(), progress=progress)
    return None if frames is None else to_frames(frames)


def save(parts: Parts, frames: Tensor | None, target: str | Path, fps: int, metadata: Mapping[str, Any]) -> None:
    """Write the frames of rank 0; the others wait."""

    def work() -> None:
        assert frames is not None
        save_video(frames, target, fps, metadata)

    only_on_first(parts.mesh, work)


def ticker(progress: bool, on_step: Callable[[Step, Tensor], None] | None, mesh: Mesh | None = None) -> Hooks:
    """A progress bar over the steps, with time left, that also calls the caller's hook; of a mesh on rank 0 alone."""
    if mesh is not None and not mesh.first:
        return Hooks()
    bar = tqdm(desc="sample", unit="step", disable=not progress)

    def tick(step: Step, x0: Tensor) -> None:
        bar.total = step.total
        bar.update()
        if step.index + 1 == step.total:
            bar.close()
        if on_step is not None:
            on_step(step, x0)

    return Hooks(on_step=tick)
