"""Denoisers: what turns the transformer's velocity into the x0 estimate that a solver follows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightx2v.blocks import RunBlocks, run_blocks
from lightx2v.sampling import Denoiser, Step


@dataclass(frozen=True)
class Conditioning:
    """What a prompt became. context: (1, S, text_dim) float32; rows after the text are zero and still attended."""

    context: Tensor


# (latents (B, C, T, H, W), timestep in [0, 1000], cond) -> velocity (B, C, T, H, W) float32
Velocity = Callable[[Tensor, float, Conditioning], Tensor]


def velocity_of(transformer: nn.Module, run: RunBlocks = run_blocks) -> Velocity:
    """The transformer as a function of values; `run` walks its blocks (cache, offload and cancel wrap it)."""

    def velocity(latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        batch = latents.shape[0]
        t = torch.full((batch,), timestep, dtype=torch.float32, device=latents.device)
        return transformer(latents, t, cond.context.expand(batch, -1, -1), run).float()

    return velocity


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (arXiv:2207.12598). scale == 1 runs the conditional pass only."""

    velocity: Velocity
    cond: Conditioning
    uncond: Conditioning | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale != 1 and self.uncond is None:
            raise ValueError(f"cfg_scale={self.scale} needs a negative prompt (it may be empty); or set cfg_scale=1")

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        velocity = self.velocity(latents, step.timestep, self.cond)
        if self.scale != 1 and self.uncond is not None:
            uncond = self.velocity(latents, step.timestep, self.uncond)
            velocity = uncond + self.scale * (velocity - uncond)
        return latents - step.sigma * velocity


@dataclass(frozen=True)
class KeepMasked:
    """Regenerate only where mask is 1; where it is 0 the clean latents stay.

    clean, noise: (B, C, T, H, W) model space; mask: broadcastable to them, in [0, 1].
    """

    denoise: Denoiser
    clean: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        kept = step.sigma * self.noise + (1 - step.sigma) * self.clean
        x0 = self.denoise(latents * self.mask + kept * (1 - self.mask), step)
        return x0 * self.mask + self.clean * (1 - self.mask)
