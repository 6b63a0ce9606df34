"""What one video is asked for: changes for a single call, sizes that the model can make, and what it was in the end."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from lightx2v.config import Request, Sampling
from lightx2v.diffuse import schedule_of
from lightx2v.fitting import check_given, check_images
from lightx2v.identify import CheckpointInfo
from lightx2v.media import read_image
from lightx2v.models import ModelSpec
from lightx2v.shapes import VideoShape, size_for_image, snap

log = logging.getLogger(__name__)
Scale = float | Sequence[float]


class Generated(TypedDict):
    """What `LightX2VPipeline.generate` returns.

    video: (F, H, W, 3) float32 in [0, 1] on the CPU, or None where it was written to a file.
    metadata: model, task, prompt, negative_prompt, seed, width and height in pixels, num_frames, fps, steps, scheduler,
    guidance_scale, sample_shift, and seconds: stage -> wall-clock seconds.
    """

    video: Tensor | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Changes:
    """What one call asks for in place of what create_generator said; None leaves that."""

    infer_steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_scale: Scale | None = None
    sample_shift: float | None = None
    fps: int | None = None

    def shaped(self, target_shape: Sequence[int]) -> "Changes":
        """With target_shape, [height, width] or empty, in place of both; raises ValueError for any other."""
        if not target_shape:
            return self
        if len(target_shape) != 2 or self.height is not None or self.width is not None:
            raise ValueError(
                f"target_shape={list(target_shape)!r}: give [height, width] in pixels, and neither of the two alone"
            )
        return replace(self, height=int(target_shape[0]), width=int(target_shape[1]))

    def of(self, request: Request, spec: ModelSpec) -> Request:
        """The request with these changes, at a size that the model can make; says where that is another one.

        Raises ValueError for a number of steps where a list decides it.
        """
        sampling = request.sampling
        if self.infer_steps is not None:
            if sampling.scheduler == "distilled" and self.infer_steps != len(sampling.denoising_step_list):
                raise ValueError(
                    f"infer_steps={self.infer_steps}: a distilled model walks denoising_step_list="
                    f"{list(sampling.denoising_step_list)}; give another list to create_generator"
                )
            sampling = replace(sampling, steps=self.infer_steps)
        if self.guidance_scale is not None:
            sampling = guided(sampling, self.guidance_scale)
        if self.sample_shift is not None:
            sampling = replace(sampling, shift=float(self.sample_shift))
        asked = {"height": self.height, "width": self.width, "num_frames": self.num_frames, "fps": self.fps}
        changed = replace(request, sampling=sampling, **{k: v for k, v in asked.items() if v is not None})  # type: ignore[arg-type]
        return snapped(changed, spec)


@dataclass(frozen=True)
class Call:
    """What `LightX2VPipeline.generate` was called with, but for what shows and saves the result.

    images: paths of the first and of the last frame. fixed: exactly the size asked for, cutting the images.
    """

    task: str
    prompt: str
    negative_prompt: str
    seed: int
    images: tuple[str | Path | None, str | Path | None]
    changes: Changes
    fixed: bool

    def of(self, before: Request, info: CheckpointInfo) -> tuple[Request, tuple[Tensor | None, Tensor | None]]:
        """The request, and its pictures (1, H, W, 3); before: what create_generator said.

        Raises CheckpointError for a picture that is missing or that the model cannot use, ValueError where they are not
        those of the task.
        """
        given = {name: path is not None for name, path in zip(("start", "end"), self.images, strict=True)}
        check_images(info, **given)
        check_given(self.task, **given)
        start, end = (None if path is None else read_image(path) for path in self.images)
        request = self.changes.of(before, info.spec)
        request = replace(request, prompt=self.prompt, negative_prompt=self.negative_prompt)
        request = replace(request, sampling=replace(request.sampling, seed=self.seed))
        shown = start if start is not None else end
        return request if shown is None or self.fixed else sized_for(shown, request, info.spec), (start, end)


def guided(sampling: Sampling, scale: Scale) -> Sampling:
    """The same with one scale, or those of both experts."""
    high, low = two_scales(scale)
    return replace(sampling, cfg_scale=high, cfg_low=low)


def two_scales(given: Scale) -> tuple[float, float | None]:
    """One scale for all, or those of the high- and the low-noise expert."""
    if isinstance(given, int | float):
        return float(given), None
    if len(given) != 2:
        raise ValueError(f"guidance_scale={given!r}: give one number, or two for the high- and the low-noise expert")
    return float(given[0]), float(given[1])


def snapped(request: Request, spec: ModelSpec) -> Request:
    """The request at the nearest size below that the model can make; says where that is another one."""
    video = VideoShape(request.num_frames, request.height, request.width)
    shape, note = snap(video, spec.latents, spec.patch_size)
    if note:
        log.warning(note)
    return replace(request, num_frames=shape.num_frames, height=shape.height, width=shape.width)


def sized_for(image: Tensor, request: Request, spec: ModelSpec) -> Request:
    """The request at the proportions of its image (1, H, W, 3), with the area that it had."""
    area = request.height * request.width
    given = (image.shape[1], image.shape[2])
    if spec.size_for_image is not None:
        height, width = spec.size_for_image(area, given)
    else:
        height, width = size_for_image(area, given, spec.latents, spec.patch_size)
    return replace(request, height=height, width=width)


def described(request: Request) -> dict[str, Any]:
    """The request as `Generated.metadata` holds it."""
    sampling = request.sampling
    low = sampling.cfg_low
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": sampling.seed,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "fps": request.fps,
        "steps": len(schedule_of(sampling).timesteps),
        "scheduler": sampling.scheduler,
        "guidance_scale": sampling.cfg_scale if low is None else [sampling.cfg_scale, low],
        "sample_shift": sampling.shift,
    }


def in_words(request: Request) -> str:
    """Size and steps."""
    told = described(request)
    size = f"{request.width}x{request.height}, {request.num_frames} frames at {request.fps} fps"
    return f"{size}, {told['steps']} {told['scheduler']} steps"
