"""Encoding clips that are mostly blank: a picture or two with grey between, as Wan's image-to-video wants them.

While blank frames come in, each stage of the encoder sooner or later repeats itself: once all the frames that it looks
back on are blank, its output is one frame for ever, and it need not run. The first stages, which work on the largest
frames, get there first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightx2v.vae.layers import State, advance
from lightx2v.vae.stream import CausalVAE, OnChunk, check_count, check_frames, empty_latents, spans

CHUNK = 4  # frames of one latent frame


@dataclass(frozen=True)
class Stage:
    """A stage of the encoder while blank frames come in without end."""

    layer: nn.Module
    rate: int  # frames of the clip for one frame that comes out, after the first
    still: int  # of the frames that come out, the first from which on all are alike

    def is_still(self, frames: int) -> bool:
        """Whether, after so many frames of the clip, a frame has come out that all later ones will be like."""
        return frames > 0 and (frames - 1) // self.rate >= self.still


def stages(vae: CausalVAE, blank_from: int) -> list[Stage]:
    """The encoder's stages, for a clip that is blank from frame `blank_from` on.

    A convolution over k frames in steps of s makes its frame j from frames s j - k + 1 to s j. So if what goes in is
    alike from frame n on, what comes out is alike from the first j with s j - k + 1 >= n on. That also keeps clear of
    the zeros before the clip, and of its first frame, which halving in time passes through. Nothing else in the encoder
    looks back further: Wan2.2's means of two frames start later than the convolution beside them.
    """
    found, rate, still = [], 1, blank_from
    for layer in vae.encoder.stages():
        for conv in layer.modules():
            if isinstance(conv, nn.Conv3d):
                step = conv.stride[0]
                still, rate = -(-(still + conv.kernel_size[0] - 1) // step), rate * step
        found.append(Stage(layer, rate, still))
    return found


def encode_padded(
    vae: CausalVAE,
    num_frames: int,
    *,
    start: Tensor | None = None,
    end: Tensor | None = None,
    blank: float = 0.0,
    on_chunk: OnChunk | None = None,
) -> Tensor:
    """Raw latents (B, z, T, h, w) float32 of `num_frames` frames: `start`, blank frames, `end`.

    start, end: (B, 3, S, H, W) and (B, 3, E, H, W) in [-1, 1]; at least one of them. blank: the value of the frames
    between; 0 is the grey of Wan's image-to-video (0.5 of a picture in [0, 1]).
    The latents are those of `encode` on the whole clip, to rounding; a stage that only repeats itself is not run.
    Raises ValueError for a length that is not 4n + 1, and for pictures that do not fit it, the VAE or each other.
    """
    check_count(num_frames)
    given = [frames for frames in (start, end) if frames is not None]
    for frames in given:
        check_frames(vae, frames)
    _check_given(given, num_frames)
    clip = _Clip(num_frames, start, end, blank)
    plan = stages(vae, clip.blank_from)
    raw = empty_latents(vae, given[0], num_frames)
    state: State = {}
    held: Tensor | None = None  # what the last of the stages that are still has given
    with torch.inference_mode():
        for first, stop in spans(num_frames, CHUNK):
            skipped = _still(plan, first) if clip.is_blank(first, stop) else 0
            if skipped and held is not None:
                x = held.expand(-1, -1, (stop - first) // plan[skipped - 1].rate, -1, -1)
                x = x.contiguous(memory_format=torch.channels_last_3d)
            else:
                x = vae.prepare(clip.frames(first, stop).to(vae.conv2.weight))
            still = _still(plan, stop)
            for index in range(skipped, len(plan)):
                x = advance(plan[index].layer, x, state)
                if index + 1 == still:
                    held = x[:, :, -1:].clone()
            done = (stop - 1) // CHUNK + 1
            raw[:, :, done - 1 : done] = vae.moments(x)[0]
            if on_chunk is not None:
                on_chunk(done, raw.shape[2])
    return raw


def _still(plan: list[Stage], frames: int) -> int:
    """How many of the first stages are still after so many frames of the clip."""
    return next((index for index, stage in enumerate(plan) if not stage.is_still(frames)), len(plan))


def _check_given(given: list[Tensor], num_frames: int) -> None:
    if not given:
        raise ValueError("neither start nor end is given: nothing tells the size; give one of them")
    if any(not frames.numel() for frames in given):
        raise ValueError("start or end has no frames: give at least one, or None")
    sizes = [f"{frames.shape[0]} x {frames.shape[4]}x{frames.shape[3]} pixels" for frames in given]
    if len(set(sizes)) > 1:
        raise ValueError(f"start is {sizes[0]} and end is {sizes[1]}: expected the same; resize one of them")
    count = sum(frames.shape[2] for frames in given)
    if count > num_frames:
        raise ValueError(f"start and end are {count} frames, the clip is {num_frames}: cut them or make it longer")


@dataclass(frozen=True)
class _Clip:
    """Frames that are put together where they are read."""

    num_frames: int
    start: Tensor | None
    end: Tensor | None
    blank: float

    @property
    def blank_from(self) -> int:
        return 0 if self.start is None else self.start.shape[2]

    @property
    def blank_to(self) -> int:
        return self.num_frames - (0 if self.end is None else self.end.shape[2])

    def is_blank(self, first: int, stop: int) -> bool:
        return self.blank_from <= first and stop <= self.blank_to

    def frames(self, first: int, stop: int) -> Tensor:
        """(B, 3, stop - first, H, W)"""
        parts = []
        if self.start is not None:
            parts.append(self.start[:, :, first:stop])
        grey = min(stop, self.blank_to) - max(first, self.blank_from)
        if grey > 0:
            like = self.start if self.start is not None else self.end
            assert like is not None  # one of them is given
            b, c, _, h, w = like.shape
            parts.append(torch.full((b, c, grey, h, w), self.blank, dtype=like.dtype, device=like.device))
        if self.end is not None:
            parts.append(self.end[:, :, max(first - self.blank_to, 0) : max(stop - self.blank_to, 0)])
        return torch.cat(parts, 2)
