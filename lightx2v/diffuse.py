"""From conditioning and (possibly empty or half-denoised) raw latents to raw latents: one pass of the sampler.

The rules at the border are ComfyUI's, so that latents can be handed over in both directions at any step:
raw VAE space outside, all-zero means empty, noise drawn on the CPU, half-denoised latents divided by (1 - sigma).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightx2v.blocks import Branch, RunBlocks, Walks, interruptible, run_blocks
from lightx2v.cache.turn import CacheFactory, Turn
from lightx2v.config import Sampling
from lightx2v.diagnosis import check_given, explain, looking
from lightx2v.guidance import CFG, Conditioning, Experts, KeepMasked, Velocity, is_high, velocity_of
from lightx2v.kept import KeptByBranch, anew
from lightx2v.latents import HUNYUAN15, WAN21, WAN22, LatentFormat
from lightx2v.models import ModelSpec
from lightx2v.paired import Both, Paired, in_turn
from lightx2v.parallel.agreement import together
from lightx2v.parallel.guidance import own_branch, split
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.sequence import shard
from lightx2v.sampling import Denoiser, OnStep, Step, sample
from lightx2v.schedules import TRAIN_STEPS, Schedule, listed, simple, wan
from lightx2v.solvers import SOLVERS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What the caller sees while a request runs. Both may raise to cancel: of several processes one is enough.

    Of several processes all must give on_block, or none.
    """

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


@dataclass(frozen=True)
class Model:
    """A loaded model. A network is a function that brings the transformer to `device` and returns it.

    around: for transformers whose blocks are not all there, goes around every walk over them; it is told whose pass
        comes next ("high", "low", or "" of one network), or None after the last.
    mesh: of several processes that make one video together; the networks must have been built with it.
    keeps: whether there is room for what steps compute alike, the keys and values of prompt and images.
    paired: whether both passes of guidance visit each block in turn, for blocks that are not all there.
    """

    spec: ModelSpec
    device: torch.device
    network: Callable[[], nn.Module]  # of two experts the one for high noise
    low: Callable[[], nn.Module] | None = None
    around: Callable[[RunBlocks, str | None], RunBlocks] = field(default=lambda run, following: run, kw_only=True)
    mesh: Mesh | None = field(default=None, kw_only=True)
    keeps: bool = field(default=True, kw_only=True)
    paired: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Start:
    """What sampling begins with.

    latents: (B, C, T, H, W) raw VAE space; all zeros starts from noise alone; with add_noise=False they carry the noise
        of start_step.
    mask: 1 where to denoise, 0 where to keep, (H, W) or (B|1, [1,] [T,] H, W) of any size; None denoises everything.
    batch_index: see noise_like.
    """

    latents: Tensor
    mask: Tensor | None = None
    batch_index: Sequence[int] | None = None


SPACES = {space.channels: space for space in (WAN21, WAN22, HUNYUAN15)}


def fit_empty(latents: Tensor, space: LatentFormat) -> Tensor:
    """Zeros mean "empty": they are refitted to the space, for the same pixels. Anything else must fit."""
    if latents.any():
        if latents.shape[1] != space.channels:
            raise ValueError(
                f"the latents have {latents.shape[1]} channels, the model's have {space.channels}: encode with the VAE "
                "that belongs to the model (Wan2.2 TI2V-5B: Wan2.2 VAE; all other Wan: Wan2.1 VAE; HunyuanVideo-1.5: "
                "its own)"
            )
        return latents
    if latents.ndim == 4:
        latents = latents.unsqueeze(2)
    batch, channels, t, h, w = latents.shape
    if channels in SPACES:
        _, down_h, down_w = SPACES[channels].stride
        h, w = h * down_h // space.stride[1], w * down_w // space.stride[2]
    return latents.new_zeros(batch, space.channels, t, h, w)


def diffuse(
    model: Model,
    start: Start,
    sampling: Sampling,
    cond: Conditioning,
    uncond: Conditioning | None,
    *,
    hooks: Hooks = Hooks(),
    run: RunBlocks = run_blocks,
    cache: CacheFactory | None = None,
) -> Tensor:
    """Denoise raw latents (B, C, T, H, W) -> raw latents, float32, on the CPU.

    cache: called once for each network; what it returns lives as long as this call.
    Raises ValueError for latents of another space, and for a guided request without `uncond`; FloatingPointError for
    latents, a mask or conditioning that are not finite, and for an estimate that is not, with its step, block and
    attention backend.
    """
    full, space = schedule_of(sampling), model.spec.latents
    steps = len(full.timesteps)
    schedule = full.between(sampling.start_step, steps if sampling.end_step is None else min(sampling.end_step, steps))
    check_given(start.latents, start.mask, cond, uncond)
    latents = fit_empty(start.latents.float().cpu(), space)
    clean = space.normalize(latents) if latents.any() else latents
    noise = noise_like(latents, sampling.seed, start.batch_index) if sampling.add_noise else torch.zeros_like(clean)
    first = schedule.sigmas[0]
    x = (first * noise + (1 - first) * clean).to(model.device)
    mask = None if start.mask is None else fit_mask(start.mask, latents.shape).to(model.device)
    share = None
    if mask is not None and model.spec.keeps_frames:
        share = mask.mean((1, 3, 4)).expand(len(latents), -1)
    hooks = hooks if model.mesh is None else _agreed(hooks, model.mesh)
    pair = Paired(run)
    both, run = (pair.both, pair) if model.paired else (in_turn, run)
    run = shard(interruptible(run, hooks.on_block) if hooks.on_block else run, model.mesh)

    def denoiser(cache: CacheFactory | None) -> Denoiser:
        denoise = _guided(model, sampling, (cond, uncond), _Walking(run, cache, full, schedule, both), share)
        if mask is None:
            return denoise
        kept_noise = None if model.spec.keeps_frames else noise.to(model.device)
        return KeepMasked(denoise, clean.to(model.device), kept_noise, mask)

    _warn(sampling, steps, model.mesh)
    solver = SOLVERS["unipc" if sampling.scheduler == "unipc" else "euler"]()
    why = explain(lambda: denoiser(partial(looking, mesh=model.mesh)), cache is not None)
    out = sample(denoiser(cache), x, schedule, solver, hooks.on_step, why)
    return space.denormalize(out.cpu() / (1 - schedule.sigmas[-1]))


def _agreed(hooks: Hooks, mesh: Mesh) -> Hooks:
    """The same hooks; what one process raises in them stops all at the same place."""
    on_step, on_block = hooks.on_step, hooks.on_block
    hooks = replace(hooks, on_step=lambda step, x0: together(mesh, lambda: on_step(step, x0)))
    return hooks if on_block is None else replace(hooks, on_block=lambda: together(mesh, on_block))


@dataclass(frozen=True)
class _Walking:
    """How the networks of one request walk their blocks."""

    run: RunBlocks
    cache: CacheFactory | None
    full: Schedule
    part: Schedule  # of the full schedule: what this request runs
    both: Both

    def turn(self, model: Model, expert: str, steps: range, guided: bool) -> Turn:
        """What one network has to do, of the steps in `steps` of the full schedule."""
        network = model.low if expert == "low" and model.low is not None else model.network
        ran = range(max(self.part.first, steps.start), min(self.part.first + len(self.part.timesteps), steps.stop))
        timesteps = self.full.timesteps[steps.start : steps.stop]
        return Turn(expert, steps, timesteps, ran, self.full.total, guided, network, model.spec.time_signal)

    def after(self, turn: Turn) -> str | None:
        """The expert whose turn follows that one, if this request has another."""
        more = turn.ran.stop < self.part.first + len(self.part.timesteps)
        return "low" if turn.expert == "high" and more else None


def _guided(
    model: Model,
    sampling: Sampling,
    conds: tuple[Conditioning, Conditioning | None],
    walking: _Walking,
    share: Tensor | None,
) -> Denoiser:
    """Guidance around the model, or around each of its two experts."""
    cond, uncond = conds[0].to(model.device), conds[1]
    uncond = uncond.to(model.device) if uncond is not None and sampling.guided else None

    def guided(expert: str, steps: range, scale: float) -> Denoiser:
        turn = walking.turn(model, expert, steps, scale != 1)
        walks: Walks = walking.cache(turn, walking.run) if walking.cache else lambda step, branch: walking.run
        kept = KeptByBranch(turn.ran)

        final = own_branch(model.mesh, scale) or turn.branches[-1]

        def passes(step: Step, branch: Branch) -> Velocity:
            last = step.index + 1 == turn.ran.stop and (model.paired or branch == final)
            walk = model.around(walks(step.index, branch), walking.after(turn) if last else expert)
            arguments = partial(model.spec.arguments, step_end=TRAIN_STEPS * step.sigma_next)
            keep = kept.of(step.index, branch) if model.keeps else anew
            return velocity_of(turn.network, walk, share, arguments, keep)

        return split(CFG(passes, cond, uncond, scale, walking.both), model.mesh)

    total = walking.full.total
    if model.low is None:
        return guided("", range(total), sampling.cfg_scale)
    boundary = sampling.boundary if sampling.boundary is not None else model.spec.boundary
    if boundary is None:
        raise ValueError(f"{model.spec.title} is not one of two experts; load it alone")
    timesteps = enumerate(walking.full.timesteps)
    switch = sum(is_high(index, timestep, boundary, sampling.boundary_step) for index, timestep in timesteps)
    high = guided("high", range(switch), sampling.cfg_scale)
    low = guided("low", range(switch, total), sampling.cfg_scale if sampling.cfg_low is None else sampling.cfg_low)
    return Experts(high, low, boundary, sampling.boundary_step)


def fit_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of any size -> (B|1, 1, T, H, W) of latents of that shape, float32, resized (tri)linearly."""
    mask = mask.float().cpu()
    if mask.ndim < 5:
        mask = mask.reshape(-1, 1, 1, *mask.shape[-2:])
    t, h, w = shape[2:]
    if mask.shape[0] not in (1, shape[0]):
        raise ValueError(f"noise_mask has a batch of {mask.shape[0]}, the latents of {shape[0]}")
    return torch.nn.functional.interpolate(mask, size=(t, h, w), mode="trilinear", align_corners=False)


def _warn(sampling: Sampling, steps: int, mesh: Mesh | None) -> None:
    if mesh is not None and not mesh.first:
        return
    if mesh is not None and mesh.cfg.size == 2 and not sampling.guided:
        log.warning(
            "cfg 2 without guidance (cfg 1): both halves of the %d processes compute the same; share tokens with all "
            "of them instead: ulysses or ring %d",
            mesh.size,
            mesh.size,
        )
    if steps <= 8 and sampling.guided:
        log.warning(
            "%d steps with cfg %g: step-distilled models are made for cfg 1; an undistilled one needs 20 or more steps",
            steps,
            sampling.cfg_scale,
        )
