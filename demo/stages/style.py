"""A LoRA for a style: by night. The backdrop goes dark and the object glows; shape, colour and motion stay as they are.

`darkness` is the measure of it, and needs nothing but the clip.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.grammar import held_out_pairs
from demo.optim import Optimizer
from demo.stages.base import DRY_CLIPS, Base, runnable, trainable
from demo.stages.evaluate import PAIRS, Loaded, Recipe, make_clips, plain_velocity, report_clips
from demo.stages.fp8 import write
from demo.stages.loop import clock_since, fit
from demo.stages.lora import SETTINGS, lora_step, merged, new_factors, to_kohya
from demo.stages.pool import Pool, draw_pool
from demo.stages.run import Run
from demo.stages.t2v import CLIPS, Mixture, training_loss
from demo.world import Clips, Scene, object_palette
from lightx2v.schedules import wan
from lightx2v.vae.wan import WanVAE

FILE = "wan_t2v_night_lora_rank8.safetensors"
RANK = 8
CLIPS_BY_NIGHT = 4096
POOL_SHARE = 0.35  # of the style's seconds, at most
AFTER = 500_000  # clips that are drawn before these: far more than any pool has
MIXTURE = Mixture(noise_shift=3.0)
BRIGHTNESS = 0.2  # of the backdrop, by night
GLOW = 0.3  # share of the object's colour just outside its edge; more would read as part of the object
_CHROMA = 0.28  # max(RGB) - min(RGB) from which a pixel is the object; backdrops have at most 0.23


def by_night(scene: Scene, clips: Clips) -> Clips:
    """Clips in the style."""
    cover = clips.coverage
    glow = cover.flatten(0, 1)[:, None]
    for _ in range(3):  # a box blur thrice is nearly Gaussian
        glow = F.avg_pool2d(glow, 9, 1, 4)
    glow = (2 * glow).clamp(max=1)[:, 0].view_as(cover)[:, None] * GLOW
    colour = object_palette(cover.device)[scene.colour][:, :, None, None, None]
    backdrop = (clips.frames + 1) / 2 * BRIGHTNESS
    shade = cover[:, None]
    frames = (backdrop + glow * colour).clamp(max=1) * (1 - shade) + colour * shade
    return Clips(frames * 2 - 1, cover)


def darkness(clips: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> (B,): 1 minus the mean brightness of what is not the object or near it.

    A black backdrop has 0.94 by day, a gray one 0.5, a white one 0.05; by night all have 0.8 and more.
    """
    rgb = ((clips.float() + 1) / 2).clamp(0, 1)
    away = (rgb.amax(1) - rgb.amin(1) < _CHROMA).float()
    return 1 - (rgb.mean(1) * away).sum((1, 2, 3)) / away.sum((1, 2, 3)).clamp(min=1)


def train_style(run: Run, base: Base, vae: WanVAE, seconds: float) -> None:
    """Draw clips in the style, fit a LoRA to them, write FILE; `seconds` in all."""
    start = time.monotonic()
    count = 2 if run.dry else CLIPS_BY_NIGHT
    pool: Pool = draw_pool(run, vae, count, seconds * POOL_SHARE, after=AFTER, look=by_night)
    run.log(f"{len(pool)} clips by night after {time.monotonic() - start:.1f} s")
    transformer, generator = trainable(run, base.config, base.weights), run.generator(60)
    networks, clips = base.with_encoder(transformer), DRY_CLIPS if run.dry else CLIPS
    factors = new_factors(transformer, RANK, generator)
    optimizer = Optimizer(factors.named_parameters(), SETTINGS, lambda name, weight: False)
    work = lora_step(transformer, factors, optimizer, lambda: training_loss(networks, pool, clips, generator, MIXTURE))
    clock = clock_since(start, seconds, warm=0.0)
    spent = fit(run, "style", optimizer, work, generator, clock, graph=run.device.type == "cuda")
    size = write(to_kohya(factors, optimizer), run.out / FILE, {"format": "pt"})
    run.report("style_train", {"steps": optimizer.steps, "seconds": round(spent, 1), "bytes": size})


@torch.no_grad()
def evaluate_style(run: Run, base: Base, loaded: Loaded, count: int, steps: int) -> None:
    """Darkness and the judge's verdict of the same pairs, with the LoRA and without."""
    styled = runnable(base.config, merged(base.weights, run.out / FILE), run.device)
    pairs, recipe = held_out_pairs(count), Recipe(wan(steps, 5.0))
    for name, transformer in (("style_on", styled), ("style_off", loaded.transformer)):
        start, velocity = time.monotonic(), plain_velocity(transformer)
        clips = torch.cat([make_clips(loaded, velocity, pairs[i : i + PAIRS], recipe) for i in range(0, count, PAIRS)])
        dark = darkness(clips)
        extra = {
            "count": count,
            "steps": steps,
            "darkness": round(float(dark.mean()), 3),
            "darkness_range": [round(float(value), 3) for value in dark.aminmax()],
            "seconds": round(time.monotonic() - start, 1),
        }
        report_clips(run, name, clips, pairs, extra)
