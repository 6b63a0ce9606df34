"""Rectified-flow sampling.

    x_sigma = (1 - sigma) * x0 + sigma * noise        velocity = noise - x0        x0 = x_sigma - sigma * velocity

`sigma` runs from 1 (pure noise) to 0 (clean). The transformer reads a `timestep` in [0, 1000].
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lightx2v.schedules import Schedule


@dataclass(frozen=True)
class Step:
    index: int  # in the full schedule, also where only a part of it runs
    total: int
    sigma: float
    sigma_next: float
    timestep: float


class Denoiser(Protocol):
    """Predicts x0 from noisy latents. CFG, expert switching and masks are all Denoisers."""

    def __call__(self, latents: Tensor, step: Step) -> Tensor: ...


class Solver(Protocol):
    """Advances latents from step.sigma to step.sigma_next. Multistep solvers keep history: one instance per request."""

    def __call__(self, latents: Tensor, x0: Tensor, step: Step) -> Tensor: ...


OnStep = Callable[[Step, Tensor], None]
Why = Callable[[Tensor, Step], str]  # (latents that a step began with, the step) -> words


@torch.inference_mode()
def sample(
    denoise: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    solver: Solver,
    on_step: OnStep = lambda step, x0: None,
    why: Why = lambda latents, step: "try another attention backend, or bf16 instead of fp16 weights",
) -> Tensor:
    """Integrate the flow from the schedule's first sigma to its last.

    latents: (B, C, T, H, W) float32, noised to schedule.sigmas[0].
    on_step: sees every x0 estimate, model space; raise from it to cancel.
    why: asked where an estimate that is not finite comes from.
    Raises FloatingPointError naming the step, with that answer, when an estimate is not finite.
    """
    total = schedule.total
    levels = zip(pairwise(schedule.sigmas), schedule.timesteps, strict=True)
    for index, ((sigma, sigma_next), timestep) in enumerate(levels, start=schedule.first):
        step = Step(index, total, sigma, sigma_next, timestep)
        x0 = denoise(latents, step)
        if not x0.isfinite().all():
            raise FloatingPointError(
                f"step {index + 1} of {total} (sigma {sigma:.4f}) produced NaN or infinity, {why(latents, step)}"
            )
        latents = solver(latents, x0, step)
        on_step(step, x0)
    return latents
