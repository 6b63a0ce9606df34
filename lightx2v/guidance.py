"""Denoisers: what turns the transformer's velocity into the x0 estimate that a solver follows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.blocks import Branch, RunBlocks, run_blocks
from lightx2v.kept import Keep, anew
from lightx2v.paired import Both, in_turn
from lightx2v.sampling import Denoiser, Step
from lightx2v.schedules import TRAIN_STEPS


@dataclass(frozen=True)
class Conditioning:
    """What a prompt, and the images given with it, became. Which of it a model reads, its family says.

    context: (1, S, text_dim) float32; of umT5, rows after the text are zero and still attended.
    image: (1 | B, C, T, H, W) input channels beside the latents, model space (image latents and their mask), or None.
    clip: (1 | B, I, image_dim) image tokens, or None.
    glyphs: (1, G, glyph_dim) tokens of quoted text, or None.
    mask: (1, S), true where a row of context counts; None: all do.
    """

    context: Tensor
    image: Tensor | None = None
    clip: Tensor | None = None
    glyphs: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "Conditioning":
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def expand(self, batch: int) -> "Conditioning":
        """The same for each entry of a batch."""
        return self._each(lambda value: value.expand(batch, *value.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in given.items()}
        return Conditioning(**changed)


# cond of a whole batch -> what a transformer is called with beside latents, timestep and run
Arguments = Callable[[Conditioning], Mapping[str, Any]]


def text_and_images(cond: Conditioning, step_end: float = 0.0) -> Mapping[str, Any]:
    """What a Wan reads, to which a step's end is nothing."""
    return {"context": cond.context, "image": cond.image, "clip": cond.clip}


# (latents (B, C, T, H, W), timestep in [0, 1000], cond) -> velocity (B, C, T, H, W) float32
Velocity = Callable[[Tensor, float, Conditioning], Tensor]
# which pass of which step -> what computes it
Passes = Callable[[Step, Branch], Velocity]


def velocity_of(
    network: Callable[[], nn.Module],
    run: RunBlocks = run_blocks,
    share: Tensor | None = None,
    arguments: Arguments = text_and_images,
    keep: Keep = anew,
) -> Velocity:
    """A transformer as a function of values; `run` walks its blocks (cache, offload and cancel wrap it).

    network: returns the transformer, brought to its device if it was elsewhere.
    share: (B, T) of the timestep that each latent frame is told, for models that keep given frames clean (0).
    arguments: how its family hands over what is asked.
    keep: what is made of that alone; another one for another cond.
    """

    def velocity(latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        batch = latents.shape[0]
        t = torch.full((batch,), timestep, dtype=torch.float32, device=latents.device)
        asked = arguments(cond.expand(batch))
        return network()(latents, t if share is None else t[:, None] * share, run=run, keep=keep, **asked).float()

    return velocity


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (arXiv:2207.12598). scale == 1 runs the conditional pass only.

    both: how the two passes run.
    """

    passes: Passes
    cond: Conditioning
    uncond: Conditioning | None = None
    scale: float = 1.0
    both: Both = in_turn

    def __post_init__(self) -> None:
        if self.scale != 1 and self.uncond is None:
            raise ValueError(f"cfg_scale={self.scale} needs a negative prompt (it may be empty); or set cfg_scale=1")

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        def velocity(branch: Branch, asked: Conditioning) -> Tensor:
            return self.passes(step, branch)(latents, step.timestep, asked)

        if self.scale == 1 or self.uncond is None:
            return latents - step.sigma * velocity("cond", self.cond)
        cond, uncond = self.both(partial(velocity, "cond", self.cond), partial(velocity, "uncond", self.uncond))
        return latents - step.sigma * (uncond + self.scale * (cond - uncond))


@dataclass(frozen=True)
class Experts:
    """Two denoisers that share one schedule: `high` lays out the video, `low` draws its detail (Wan2.2 A14B).

    boundary: sigma; `high` works while timestep >= 1000 * boundary (Wan2.2 wan/text2video.py).
    boundary_step: if given, `high` works for that many steps instead, as step-distilled pairs were trained.
    """

    high: Denoiser
    low: Denoiser
    boundary: float
    boundary_step: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.boundary <= 1:
            raise ValueError(f"boundary={self.boundary} is a noise level from 0 to 1; Wan2.2 T2V: 0.875, I2V: 0.9")

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        high = is_high(step.index, step.timestep, self.boundary, self.boundary_step)
        return (self.high if high else self.low)(latents, step)


def is_high(index: int, timestep: float, boundary: float, boundary_step: int | None = None) -> bool:
    """Whether the high-noise expert has this step; see `Experts`."""
    if boundary_step is not None:
        return index < boundary_step
    return timestep >= TRAIN_STEPS * boundary


@dataclass(frozen=True)
class KeepMasked:
    """Regenerate only where mask is 1; where it is 0 the clean latents stay.

    clean, noise: (B, C, T, H, W) model space; mask: broadcastable to them, in [0, 1].
    noise None: kept latents enter without noise, for models that are told so by a timestep a frame (Wan2.2 TI2V).
    """

    denoise: Denoiser
    clean: Tensor
    noise: Tensor | None
    mask: Tensor

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        kept = self.clean
        if self.noise is not None:
            kept = step.sigma * self.noise + (1 - step.sigma) * self.clean
        x0 = self.denoise(latents * self.mask + kept * (1 - self.mask), step)
        return x0 * self.mask + self.clean * (1 - self.mask)
