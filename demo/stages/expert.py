"""The high-noise expert of a pair like Wan2.2's: the base fine-tuned on the noise levels above the boundary.

The low-noise expert is the base itself, which has learnt all levels.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from demo.grammar import held_out_pairs
from demo.optim import Optimizer
from demo.stages.base import DRY_CLIPS, SETTINGS, Base, choose_blocks, keep_blocks, named, runnable, trainable, unnamed
from demo.stages.evaluate import PAIRS, Loaded, Recipe, make_clips, plain_velocity, report_clips
from demo.stages.fp8 import read_fp8, to_lightx2v, write
from demo.stages.loop import clock_since, fit
from demo.stages.pool import Pool
from demo.stages.run import Run
from demo.stages.t2v import CLIPS, Mixture, is_matrix, training_loss
from lightx2v.guidance import Conditioning, Velocity
from lightx2v.schedules import wan

FILE = "wan_t2v_high_noise_fp8_e4m3.safetensors"
BLOCKS = 4  # of the base's; see demo.variants on sizes
BOUNDARY = 0.875  # of Wan2.2-T2V-A14B: timesteps from 875 are the high-noise expert's
# A little below the boundary too, so that no level in use is at the edge of what was learnt.
MIXTURE = Mixture(noise_shift=1.5, uniform=0.3, floor=0.86)


def train_expert(run: Run, base: Base, pool: Pool, seconds: float) -> None:
    """Fine-tune all weights for `seconds` and write FILE."""
    start = time.monotonic()
    config, weights = keep_blocks(base, choose_blocks(run, base, pool, BLOCKS, MIXTURE))
    transformer = trainable(run, config, weights)
    networks = base.with_encoder(transformer)
    optimizer, generator = Optimizer(named(transformer), SETTINGS, is_matrix), run.generator(40)
    clips = DRY_CLIPS if run.dry else CLIPS

    def work() -> tuple[Tensor, Tensor]:
        loss, error = training_loss(networks, pool, clips, generator, MIXTURE)
        loss.backward()
        return error, optimizer.apply()

    clock = clock_since(start, seconds, warm=0.04)
    spent = fit(run, "expert", optimizer, work, generator, clock, graph=run.device.type == "cuda")
    size = write(to_lightx2v(unnamed(optimizer.averaged())), run.out / FILE, base.header.metadata)
    run.report("expert_train", {"steps": optimizer.steps, "seconds": round(spent, 1), "bytes": size})


def pair(high: Velocity, low: Velocity) -> Velocity:
    """Two velocities as one: `high` at the boundary's timestep and above."""

    def velocity(latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        return (high if timestep >= 1000 * BOUNDARY else low)(latents, timestep, cond)

    return velocity


@torch.no_grad()
def evaluate_expert(run: Run, base: Base, loaded: Loaded, count: int, steps: int) -> None:
    """The judge's verdict on the pair."""
    start, pairs = time.monotonic(), held_out_pairs(count)
    weights = read_fp8(run.out / FILE)
    config = replace(base.config, num_layers=sum(name.endswith(".norm3.weight") for name in weights))
    velocity = pair(plain_velocity(runnable(config, weights, run.device)), plain_velocity(loaded.transformer))
    recipe = Recipe(wan(steps, 5.0))
    clips = [make_clips(loaded, velocity, pairs[i : i + PAIRS], recipe) for i in range(0, count, PAIRS)]
    extra = {"count": count, "steps": steps, "boundary": BOUNDARY, "seconds": round(time.monotonic() - start, 1)}
    report_clips(run, "expert_pair_cfg4", torch.cat(clips), pairs, extra)
