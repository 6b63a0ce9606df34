"""Four steps without guidance, as a LoRA: the student jumps along its teacher's trajectories.

The teacher is the base with guidance at 20 levels, every fifth of which the student visits too. From the teacher's
state at one of its levels the student learns the straight line to the teacher's state at the next (for the last level:
to the clean latents). Later half of its states are its own, rolled out from the same noise, so that it learns to come
back to the teacher's path.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.grammar import held_out_pairs
from demo.optim import Optimizer
from demo.stages.base import BATCH, Base, runnable, trainable
from demo.stages.evaluate import PAIRS, Loaded, Recipe, make_clips, plain_velocity, report_clips
from demo.stages.fp8 import write
from demo.stages.loop import clock_since, fit
from demo.stages.lora import SETTINGS, Factors, lora_step, merged, new_factors, to_comfy
from demo.stages.pool import Pool
from demo.stages.run import Run
from demo.stages.t2v import Mixture, encode_text
from demo.tokenizer import EOS, PAD
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.sampling import Denoiser, Step, sample
from lightx2v.schedules import listed
from lightx2v.solvers import UniPC, euler

FILE = "wan_t2v_4steps_lora_rank16.safetensors"
RANK = 16
SHIFT = 5.0
LEVELS = listed((1000, 750, 500, 250), SHIFT)
TEACHER = listed(range(1000, 0, -50), SHIFT)
GUIDANCE = 4.0
MOST = 16_384  # trajectories: 11 GB with their captions
TEACHER_SHARE = 0.3  # of the student's seconds
REFRESH = (0.3, 0.5, 0.7, 0.85)  # progress at which the student's own states are made anew
FEATURES, CLIPS_TO_FIT = 768, 256  # with 512 and 72, four in five cells were right, by object and by what was found


@dataclass(frozen=True)
class Bank:
    """N trajectories of the teacher and the captions that they follow.

    context: (N, TOKENS + 1, 4096). states: (levels + 1, N, 16, T, h, w) float16, the last clean. own: likewise without
    the last: where the student itself gets to. cover: (N, 1, T, h, w) uint8, 255 where the object or its edge is.
    """

    context: Tensor
    states: Tensor
    own: Tensor
    cover: Tensor

    def __len__(self) -> int:
        return self.context.shape[0]


@dataclass(frozen=True)
class ObjectFinder:
    """Where latents show an object: ridge regression on random features of 3 x 3 cells.

    kernel (FEATURES, 16, 1, 3, 3), bias (FEATURES,), readout (FEATURES + 1,).
    """

    kernel: Tensor
    bias: Tensor
    readout: Tensor

    def features(self, latents: Tensor) -> Tensor:
        """(B, 16, T, h, w) model space -> (B T h w, FEATURES + 1), the last of them 1."""
        made = F.conv3d(latents.float(), self.kernel, self.bias, padding=(0, 1, 1)).relu()
        return F.pad(made.movedim(1, -1).flatten(0, -2), (0, 1), value=1.0)

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, 16, T, h, w) model space -> (B, 1, T, h, w) uint8, 255 where an object or its edge is for sure."""
        found = (self.features(latents) @ self.readout).clamp(0, 1)
        return (found * 255).round().to(torch.uint8).view(len(latents), 1, *latents.shape[2:])


@torch.no_grad()
def fit_finder(pool: Pool, generator: torch.Generator) -> ObjectFinder:
    """Learn from clips of which the renderer said where the object is."""
    device, channels = pool.latents.device, pool.latents.shape[1]
    kernel = torch.randn(FEATURES, channels, 1, 3, 3, device=device, generator=generator) * (9 * channels) ** -0.5
    bias = torch.randn(FEATURES, device=device, generator=generator) * 0.5
    finder = ObjectFinder(kernel, bias, torch.zeros(FEATURES + 1, device=device))
    seen = finder.features(pool.latents[:CLIPS_TO_FIT]).double()
    true = (pool.coverage[:CLIPS_TO_FIT].flatten() > 127).double()
    ridge = 1e-4 * len(seen) * torch.eye(FEATURES + 1, dtype=torch.float64, device=device)
    readout = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ true)
    return replace(finder, readout=readout.float())


def guided(transformer: WanTransformer, context: Tensor, empty: Tensor, seen: list[Tensor]) -> Denoiser:
    """The teacher for B captions, both halves of its guidance at once.

    context: (B, S, 4096), empty: (1, S, 4096). seen: gets the states at the student's levels.
    """
    both, count = torch.cat([context, empty.expand_as(context)]), 2 * len(context)

    def denoise(latents: Tensor, step: Step) -> Tensor:
        if step.sigma in LEVELS.sigmas:
            seen.append(latents.half())
        timestep = torch.full((count,), step.timestep, device=latents.device)
        cond, uncond = transformer(torch.cat([latents, latents]), timestep, both).float().chunk(2)
        return latents - step.sigma * (uncond + GUIDANCE * (cond - uncond))

    return denoise


@torch.no_grad()
def make_bank(run: Run, base: Base, teacher: WanTransformer, pool: Pool, seconds: float) -> Bank:
    """Trajectories for `seconds`, or MOST of them."""
    start, generator, batch = time.monotonic(), run.generator(50), 2 if run.dry else BATCH // 2
    find_objects = fit_finder(pool, generator)
    dtype, device = teacher.patch_embedding.weight.dtype, run.device
    empty = torch.full_like(pool.ids[:1, 0].long(), PAD)
    empty[:, 0] = EOS
    empty = encode_text(base.encoder, empty, dtype)
    contexts: list[Tensor] = []
    states: list[Tensor] = []
    covers: list[Tensor] = []
    while not states or (time.monotonic() - start < seconds and len(states) * batch < MOST):
        row = torch.randint(len(pool), (batch,), device=device, generator=generator)
        column = torch.randint(pool.ids.shape[1], (batch,), device=device, generator=generator)
        contexts.append(encode_text(base.encoder, pool.ids[row, column].long(), dtype))
        noise = torch.randn(batch, *pool.latents.shape[1:], device=device, generator=generator)
        seen: list[Tensor] = []
        clean = sample(guided(teacher, contexts[-1], empty, seen), noise, TEACHER, UniPC())
        states.append(torch.stack([*seen, clean.half()]))
        covers.append(find_objects(clean))
    joined = torch.cat(states, 1)
    bank = Bank(torch.cat(contexts), joined, joined[:-1].clone(), torch.cat(covers))
    share = round(float(bank.cover.float().mean()) / 255, 3)
    seconds = round(time.monotonic() - start, 1)
    run.report("student_bank", {"trajectories": len(bank), "object_share": share, "seconds": seconds})
    return bank


@torch.inference_mode()
def roll_out(transformer: WanTransformer, bank: Bank, batch: int) -> None:
    """Put into `own` where the student gets by itself from the bank's noise; batches of one size only."""
    for first in range(0, len(bank) - batch + 1, batch):
        rows = slice(first, first + batch)
        latents = bank.states[0, rows].float()
        for level in range(1, len(LEVELS.timesteps)):
            timestep = torch.full((batch,), LEVELS.timesteps[level - 1], device=latents.device)
            velocity = transformer(latents, timestep, bank.context[rows]).float()
            latents = latents + (LEVELS.sigmas[level] - LEVELS.sigmas[level - 1]) * velocity
            bank.own[level, rows] = latents.half()


def student_loss(
    transformer: WanTransformer, bank: Bank, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The loss to minimise and, detached, the plain mean square error of the velocity, over `count` states."""
    device = bank.states.device
    row = torch.randint(len(bank), (count,), device=device, generator=generator)
    level = torch.randint(len(LEVELS.timesteps), (count,), device=device, generator=generator)
    alone = torch.rand(count, 1, 1, 1, 1, device=device, generator=generator) < 0.5
    # Filled and not copied from the host, which no CUDA graph allows.
    sigmas = torch.stack([torch.full((), value, device=device) for value in LEVELS.sigmas])
    sigma, sigma_next = (values.view(-1, 1, 1, 1, 1) for values in (sigmas[level], sigmas[level + 1]))
    taught, goal = bank.states[level, row].float(), bank.states[level + 1, row].float()
    latents = torch.where(alone, bank.own[level, row].float(), taught)
    # The teacher's line, bent so that what the student is off by shrinks with sigma and is gone at the end.
    target = (taught - goal) / (sigma - sigma_next) + (latents - taught) / sigma
    velocity = transformer(latents, 1000 * sigma.flatten(), bank.context[row]).float()
    error = (velocity - target).square()
    weight = 1 + Mixture().object_weight * bank.cover[row].float() / 255
    return (error * weight).mean(), error.detach().mean()


def _refresher(
    run: Run, transformer: WanTransformer, factors: Factors, bank: Bank, batch: int
) -> Callable[[float], None]:
    due = list(REFRESH)

    def refresh(progress: float) -> None:
        if due and progress >= due[0]:
            due.pop(0)
            factors.merge()
            roll_out(transformer, bank, batch)
            run.log(f"the student's own states at {progress:.0%}")

    return refresh


def train_student(run: Run, base: Base, pool: Pool, seconds: float) -> None:
    """Make trajectories, fit a LoRA to them, write FILE; `seconds` in all."""
    start = time.monotonic()
    transformer = trainable(run, base.config, base.weights)
    bank = make_bank(run, base, transformer, pool, seconds * TEACHER_SHARE)
    generator, batch = run.generator(51), 2 if run.dry else BATCH
    factors = new_factors(transformer, RANK, generator)
    optimizer = Optimizer(factors.named_parameters(), SETTINGS, lambda name, weight: False)
    work = lora_step(transformer, factors, optimizer, lambda: student_loss(transformer, bank, batch, generator))
    clock = clock_since(start, seconds, warm=0.0)
    spent = fit(
        run,
        "student",
        optimizer,
        work,
        generator,
        clock,
        graph=run.device.type == "cuda",
        on_step=_refresher(run, transformer, factors, bank, batch),
    )
    size = write(to_comfy(factors, optimizer), run.out / FILE, {"format": "pt"})
    run.report("student_train", {"steps": optimizer.steps, "seconds": round(spent, 1), "bytes": size})


@torch.no_grad()
def evaluate_student(run: Run, base: Base, loaded: Loaded, count: int) -> None:
    """The judge's verdict at four steps without guidance, with the LoRA and without."""
    student = runnable(base.config, merged(base.weights, run.out / FILE), run.device)
    pairs, recipe = held_out_pairs(count), Recipe(LEVELS, lambda: euler, cfg_scale=1.0)
    for name, transformer in (("student_4steps", student), ("base_4steps_cfg1", loaded.transformer)):
        start, velocity = time.monotonic(), plain_velocity(transformer)
        clips = [make_clips(loaded, velocity, pairs[i : i + PAIRS], recipe) for i in range(0, count, PAIRS)]
        extra = {"count": count, "steps": len(LEVELS.timesteps), "seconds": round(time.monotonic() - start, 1)}
        report_clips(run, name, torch.cat(clips), pairs, extra)
