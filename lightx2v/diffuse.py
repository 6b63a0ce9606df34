"""From conditioning and (possibly empty or half-denoised) raw latents to raw latents: one pass of the sampler.

The rules at the border are ComfyUI's, so that latents can be handed over in both directions at any step:
raw VAE space outside, all-zero means empty, noise drawn on the CPU, half-denoised latents divided by (1 - sigma).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightx2v.blocks import RunBlocks, interruptible, run_blocks
from lightx2v.config import Sampling
from lightx2v.guidance import CFG, Conditioning, KeepMasked, velocity_of
from lightx2v.latents import LatentFormat
from lightx2v.sampling import Denoiser, OnStep, Step, sample
from lightx2v.schedules import Schedule, listed, simple, wan
from lightx2v.solvers import SOLVERS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What the caller sees while a request runs. Both may raise to cancel."""

    on_step: OnStep = lambda step, x0: None  # x0 (B, C, T, H, W), model space
    on_block: Callable[[], None] | None = None  # before every transformer block


def schedule_of(sampling: Sampling) -> Schedule:
    """The full schedule that a request names."""
    if sampling.scheduler == "distilled":
        return listed(sampling.denoising_step_list, sampling.shift)
    if sampling.scheduler == "unipc":
        return wan(sampling.steps, sampling.shift)
    return simple(sampling.steps, sampling.shift)


def noise_like(latents: Tensor, seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise from a CPU generator of its own: the same on every machine, nothing global is seeded.

    batch_index: which of the seed's consecutive videos each entry of the batch is, for latents cut from a batch.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if batch_index is None:
        return torch.randn(latents.shape, generator=generator, dtype=torch.float32, device="cpu")
    drawn = [
        torch.randn(1, *latents.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(max(batch_index) + 1)
    ]
    return torch.cat([drawn[index] for index in batch_index])


def _fit_empty(latents: Tensor, channels: int) -> Tensor:
    """Zeros mean "empty" whatever their channel count or missing T axis; anything else must fit."""
    if latents.any():
        return latents
    if latents.ndim == 4:
        latents = latents.unsqueeze(2)
    return latents.new_zeros(latents.shape[0], channels, *latents.shape[2:])


def diffuse(
    transformer: nn.Module,
    latents: Tensor,
    sampling: Sampling,
    cond: Conditioning,
    uncond: Conditioning | None,
    *,
    space: LatentFormat,
    mask: Tensor | None = None,
    batch_index: Sequence[int] | None = None,
    hooks: Hooks = Hooks(),
    run: RunBlocks = run_blocks,
) -> Tensor:
    """Denoise raw latents (B, C, T, H, W) -> raw latents, float32, on the CPU.

    latents: raw VAE space; all zeros starts from noise alone; with add_noise=False they carry the noise of start_step.
    mask: 1 where to denoise, 0 where to keep, (H, W) or (B|1, [1,] [T,] H, W) of any size; None denoises everything.
    batch_index: see noise_like.
    Runs on the device that holds the transformer.
    """
    full = schedule_of(sampling)
    end = len(full.timesteps) if sampling.end_step is None else min(sampling.end_step, len(full.timesteps))
    schedule = full.between(sampling.start_step, end)
    device = next(transformer.parameters()).device
    latents = _fit_empty(latents.float().cpu(), space.channels)
    clean = space.normalize(latents) if latents.any() else latents
    noise = noise_like(latents, sampling.seed, batch_index) if sampling.add_noise else torch.zeros_like(clean)
    first = schedule.sigmas[0]
    x = (first * noise + (1 - first) * clean).to(device)
    denoise: Denoiser = CFG(
        velocity_of(transformer, interruptible(run, hooks.on_block) if hooks.on_block else run),
        _to(cond, device),
        _to(uncond, device) if uncond is not None and sampling.cfg_scale != 1 else None,
        sampling.cfg_scale,
    )
    if mask is not None:
        denoise = KeepMasked(denoise, clean.to(device), noise.to(device), _fit_mask(mask, latents).to(device))
    _warn(sampling, len(full.timesteps))
    solver = SOLVERS["unipc" if sampling.scheduler == "unipc" else "euler"]()
    out = sample(denoise, x, schedule, solver, _renumbered(hooks.on_step, sampling.start_step, len(full.timesteps)))
    return space.denormalize(out.cpu() / (1 - schedule.sigmas[-1]))


def _fit_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask of any size -> (B|1, 1, T, H, W) of the latents, float32, resized (tri)linearly."""
    mask = mask.float().cpu()
    if mask.ndim < 5:
        mask = mask.reshape(-1, 1, 1, *mask.shape[-2:])
    t, h, w = latents.shape[2:]
    if mask.shape[0] not in (1, latents.shape[0]):
        raise ValueError(f"noise_mask has a batch of {mask.shape[0]}, the latents of {latents.shape[0]}")
    return torch.nn.functional.interpolate(mask, size=(t, h, w), mode="trilinear", align_corners=False)


def _to(cond: Conditioning, device: torch.device) -> Conditioning:
    return Conditioning(cond.context.to(device))


def _warn(sampling: Sampling, steps: int) -> None:
    if steps <= 8 and sampling.cfg_scale != 1:
        log.warning(
            "%d steps with cfg %g: step-distilled models are made for cfg 1; an undistilled one needs 20 or more steps",
            steps,
            sampling.cfg_scale,
        )


def _renumbered(on_step: OnStep, start: int, total: int) -> OnStep:
    """Steps as the whole schedule counts them, also when only a part of it runs."""

    def call(step: Step, x0: Tensor) -> None:
        on_step(replace(step, index=start + step.index, total=total), x0)

    return call
