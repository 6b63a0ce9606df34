"""Stage 5: the exported files, through the engine's own modules, judged on the held-out pairs.

Same noise, schedule and guidance as `python -m demo.judge`, but many clips at once, which is what a GPU wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from demo.grammar import held_out_pairs, parse
from demo.judge import judge, score
from demo.stages.export import TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE
from demo.stages.run import Run
from demo.world import FRAMES, HEIGHT, WIDTH
from lightx2v.checkpoint import assign, read_header
from lightx2v.guidance import CFG, Conditioning, Velocity
from lightx2v.models.wan.spec import HEAD_DIM, keep_float32, read_config
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.sampling import Solver, sample
from lightx2v.schedules import Schedule, wan
from lightx2v.shapes import VideoShape, to_latent
from lightx2v.solvers import UniPC
from lightx2v.text import qwen, umt5
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from lightx2v_kernels import select

PAIRS = 50  # clips at once


def plain_velocity(transformer: nn.Module) -> Velocity:
    """A transformer that is on its device already, as a function of values."""

    def velocity(latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        batch = len(latents)
        t = torch.full((batch,), timestep, device=latents.device)
        return transformer(latents, t, cond.context.expand(batch, -1, -1)).float()

    return velocity


@dataclass(frozen=True)
class Loaded:
    """The parts of an exported folder on one device."""

    transformer: nn.Module
    encoder: umt5.UMT5 | qwen.Qwen
    vae: Any
    velocity: Callable[[nn.Module], Velocity] = plain_velocity


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load the files of `demo.stages.export`; the transformer computes in `dtype`."""
    header = read_header(folder / TRANSFORMER)
    kernels = select(attention="torch_sdpa", device=device, dtype=dtype, head_dim=HEAD_DIM)
    with torch.device("meta"):
        transformer = WanTransformer(read_config(header), kernels)
    assign(transformer, header, dtype=lambda name: torch.float32 if keep_float32(name) else dtype, device=device)
    encoder = umt5.load(folder / TEXT_ENCODER, tokenizer=folder / TOKENIZER, device=device)
    header = read_header(folder / VAE)
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig(base_channels=header.tensors["decoder.head.0.gamma"].shape[0]))
    assign(vae, header, dtype=torch.float32, device=device)
    return Loaded(transformer.eval().requires_grad_(False), encoder, vae.eval().requires_grad_(False))


@dataclass(frozen=True)
class Recipe:
    """How clips are sampled."""

    schedule: Schedule
    solver: Callable[[], Solver] = UniPC
    cfg_scale: float = 4.0


def _asked(loaded: Loaded, prompts: Sequence[str]) -> Conditioning:
    """All prompts as one batch; shorter ones are padded, which Wan's, of one length, never are."""
    rows = [loaded.encoder.encode(prompt)[0] for prompt in prompts]
    context = pad_sequence(rows, batch_first=True)
    if len({len(row) for row in rows}) == 1:
        return Conditioning(context)
    return Conditioning(context, mask=pad_sequence([torch.ones_like(row[:, 0]) for row in rows], batch_first=True) > 0)


@torch.no_grad()
def make_clips(loaded: Loaded, velocity: Velocity, pairs: Sequence[tuple[str, int]], recipe: Recipe) -> Tensor:
    """Clips (B, 3, 17, 128, 128) in [-1, 1] of (prompt, seed) pairs, on the models' device.

    velocity: of all the clips at once. Only the text encoder and the autoencoder of `loaded` are used.
    """
    device, space = next(loaded.vae.parameters()).device, loaded.vae.space
    shape = (1, space.channels, *to_latent(VideoShape(FRAMES, HEIGHT, WIDTH), space.stride))
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for _, s in pairs])
    cond, uncond = (_asked(loaded, prompts).to(device) for prompts in ([prompt for prompt, _ in pairs], [""]))
    denoise = CFG(lambda step, branch: velocity, cond, uncond if recipe.cfg_scale != 1 else None, recipe.cfg_scale)
    latents = sample(denoise, noise.to(device), recipe.schedule, recipe.solver())
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    with half:
        clips = [loaded.vae.reconstruct(part).float() for part in space.denormalize(latents).split(8)]
    return torch.cat(clips).clamp(-1, 1)


def generate(loaded: Loaded, pairs: list[tuple[str, int]], steps: int, cfg_scale: float, shift: float) -> Tensor:
    """Clips (B, 3, 17, 128, 128) in [-1, 1] of (prompt, seed) pairs, on the models' device."""
    recipe = Recipe(schedule=wan(steps, shift), cfg_scale=cfg_scale)
    return make_clips(loaded, loaded.velocity(loaded.transformer), pairs, recipe)


def evaluate(
    run: Run, loaded: Loaded, name: str, *, count: int, steps: int = 20, cfg_scale: float = 4.0
) -> dict[str, float]:
    """Judge `count` held-out pairs and report the rates as `name`."""
    start, pairs, clips = time.monotonic(), held_out_pairs(count), []
    for first in range(0, count, PAIRS):
        clips.append(generate(loaded, pairs[first : first + PAIRS], steps, cfg_scale, 5.0))
    settings = {"count": count, "steps": steps, "cfg_scale": cfg_scale}
    return report_clips(run, name, torch.cat(clips), pairs, {**settings, "seconds": round(time.monotonic() - start, 1)})


def report_clips(
    run: Run, name: str, clips: Tensor, pairs: Sequence[tuple[str, int]], extra: Mapping[str, Any]
) -> dict[str, float]:
    """Judge the clips of the pairs and report the rates, with whatever else there is to say, as `name`."""
    findings = judge(clips)
    rates = score(findings, [parse(prompt) for prompt, _ in pairs]).rates()
    means = {"overlap": round(float(findings.overlap.mean()), 3), "present": round(float(findings.present.mean()), 3)}
    run.report(name, {**rates, **means, **extra})
    return rates
