"""Image-to-video in the layout of Wan2.2-I2V-A14B: 16 noisy channels, 4 of mask, 16 of the encoded images.

The images are encoded as a clip that is gray (0 in [-1, 1]) wherever no frame is given; the mask's four channels are
the four pixel frames of a latent frame, 1 where given, and the first pixel frame fills the four of the first latent
frame (Wan2.2 wan/image2video.py; for a last image Wan2.1 wan/first_last_frame2video.py). Nothing copies an image into
the result: the transformer has to draw it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.grammar import held_out_pairs, parse
from demo.optim import Optimizer
from demo.stages.base import DRY_CLIPS, SETTINGS, Base, choose_blocks, keep_blocks, named, runnable, trainable, unnamed
from demo.stages.evaluate import PAIRS, Loaded, Recipe, make_clips, plain_velocity, report_clips
from demo.stages.fp8 import read_fp8, to_comfy, write
from demo.stages.loop import Work, clock_since, fit
from demo.stages.pool import Pool
from demo.stages.run import Run, save_state
from demo.stages.t2v import CLIPS, Mixture, Networks, draw_batch, is_matrix
from demo.world import Clips, Scene, render, scene_of
from lightx2v.guidance import Conditioning, Velocity
from lightx2v.latents import WAN21
from lightx2v.schedules import wan
from lightx2v.vae.wan import WanVAE

FILE = "wan_i2v_fp8_scaled.safetensors"
BLOCKS = 5  # of the base's; see demo.variants on sizes
CONDITION_CHANNELS = 20
LAST_IMAGE_EVERY = 4  # one clip in so many has its last frame given too
MIXTURE = Mixture(noise_shift=3.0, uniform=0.25)
IMAGE_WEIGHT = 3.0  # extra loss weight on a latent frame whose image is given, in full or in part


@dataclass(frozen=True)
class Images:
    """Of N clips: latents (N, 16, T, h, w) of the given images, model space; last (N,) bool: a last image is given."""

    latents: Tensor
    last: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]

    def given(self) -> Tensor:
        """(N, 4, T, h, w) float32 mask of given pixel frames."""
        count, _, frames, height, width = self.latents.shape
        mask = torch.zeros(count, 4, frames, height, width, device=self.latents.device)
        mask[:, :, 0] = 1
        mask[:, 3, -1] = self.last[:, None, None].float()
        return mask

    def condition(self) -> Tensor:
        """(N, 20, T, h, w): what follows the noisy channels."""
        return torch.cat([self.given(), self.latents.float()], 1)

    def rows(self, chosen: Tensor) -> Images:
        return Images(self.latents[chosen], self.last[chosen])


@torch.no_grad()
def encode_images(run: Run, vae: WanVAE, frames: Tensor, last: Tensor) -> Images:
    """Clips (N, 3, F, H, W), of which the first frame is shown and, where `last` (N,), the last."""
    shown = torch.zeros_like(frames)
    shown[:, :, 0] = frames[:, :, 0]
    shown[:, :, -1] = torch.where(last.view(-1, 1, 1, 1), frames[:, :, -1], 0.0)
    with run.autocast():
        raw = vae.posterior(shown)[0]
    return Images(WAN21.normalize(raw).half(), last)


@dataclass(frozen=True)
class Watcher:
    """Encodes the images of the clips that a pool is made of."""

    run: Run
    vae: WanVAE
    parts: list[Images]

    def __call__(self, scene: Scene, clips: Clips) -> Clips:
        last = torch.arange(len(scene), device=clips.frames.device) % LAST_IMAGE_EVERY == LAST_IMAGE_EVERY - 1
        self.parts.append(encode_images(self.run, self.vae, clips.frames, last))
        return clips

    def images(self) -> Images:
        return Images(*(torch.cat([getattr(part, name) for part in self.parts]) for name in ("latents", "last")))


def save_images(run: Run, images: Images) -> None:
    """Keep the images of the pool for a later invocation."""
    save_state(run.state / "images.pt", {"latents": images.latents.cpu(), "last": images.last.cpu()})


def load_images(run: Run) -> Images | None:
    """The images of an earlier invocation's pool, or None."""
    path = run.state / "images.pt"
    return Images(**torch.load(path, map_location=run.device, weights_only=True)) if path.exists() else None


def widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text-to-video weights for 36 input channels; the new ones do nothing yet."""
    patch = weights["patch_embedding.weight"]
    return {**weights, "patch_embedding.weight": F.pad(patch, (0, 0, 0, 0, 0, 0, 0, CONDITION_CHANNELS))}


def image_loss(
    networks: Networks, pool: Pool, images: Images, clips: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The loss to minimise and, detached, the plain mean square error of the velocity."""
    drawn = draw_batch(networks, pool, clips, generator, MIXTURE)
    shown = images.rows(drawn.chosen)
    latents = torch.cat([drawn.noisy(), shown.condition()], 1)
    error = drawn.error(networks.transformer(latents, drawn.levels * 1000, drawn.context))
    weight = drawn.weight(MIXTURE) + IMAGE_WEIGHT * shown.given().amax(1, keepdim=True)
    return (error * weight).mean(), error.detach().mean()


def _step(networks: Networks, optimizer: Optimizer, pool: Pool, images: Images, generator: torch.Generator) -> Work:
    clips = DRY_CLIPS if len(pool) < CLIPS else CLIPS

    def work() -> tuple[Tensor, Tensor]:
        loss, error = image_loss(networks, pool, images, clips, generator)
        loss.backward()
        return error, optimizer.apply()

    return work


def train_i2v(run: Run, base: Base, pool: Pool, images: Images, seconds: float) -> None:
    """Fine-tune all weights for `seconds` and write FILE."""
    start = time.monotonic()
    config, weights = keep_blocks(base, choose_blocks(run, base, pool, BLOCKS, MIXTURE))
    config = replace(config, in_channels=config.in_channels + CONDITION_CHANNELS)
    transformer = trainable(run, config, widened(weights))
    optimizer, generator = Optimizer(named(transformer), SETTINGS, is_matrix), run.generator(30)
    work = _step(base.with_encoder(transformer), optimizer, pool, images, generator)
    clock = clock_since(start, seconds, warm=0.03)
    spent = fit(run, "i2v", optimizer, work, generator, clock, graph=run.device.type == "cuda")
    size = write(to_comfy(unnamed(optimizer.averaged())), run.out / FILE, base.header.metadata)
    run.report("i2v_train", {"steps": optimizer.steps, "seconds": round(spent, 1), "bytes": size})


def with_images(transformer: nn.Module, images: Images) -> Velocity:
    """Velocity of latents (B, 16, T, h, w), one image each."""
    condition, plain = images.condition(), plain_velocity(transformer)

    def velocity(latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        return plain(torch.cat([latents, condition], 1), timestep, cond)

    return velocity


def psnr(made: Tensor, true: Tensor) -> float:
    """Decibels, the mean over images (B, 3, H, W) in [-1, 1]."""
    return float((10 * torch.log10(4 / (made - true).square().mean((1, 2, 3)))).mean())


@torch.no_grad()
def evaluate_i2v(
    run: Run, base: Base, loaded: Loaded, count: int, steps: int, guidance: Sequence[float], *, last: bool = False
) -> None:
    """Held-out pairs whose start (and last) images the world draws: the judge's rates, and how close the images are."""
    weights = read_fp8(run.out / FILE)
    layers = sum(name.endswith(".norm3.weight") for name in weights)
    config = replace(base.config, in_channels=base.config.in_channels + CONDITION_CHANNELS, num_layers=layers)
    transformer = runnable(config, weights, run.device)
    pairs = held_out_pairs(count)
    true = render(scene_of([parse(prompt) for prompt, _ in pairs], run.device), run.generator(31)).frames
    ends = torch.full((count,), last, device=run.device)
    with run.autocast():
        limit = torch.cat([loaded.vae.reconstruct(loaded.vae.posterior(x[:, :, :1])[0]).float() for x in true.split(8)])
    for cfg_scale in guidance:
        start, made = time.monotonic(), []
        for first in range(0, count, PAIRS):
            part = slice(first, first + PAIRS)
            shown = encode_images(run, loaded.vae, true[part], ends[part])
            recipe = Recipe(wan(steps, 5.0), cfg_scale=cfg_scale)
            made.append(make_clips(loaded, with_images(transformer, shown), pairs[part], recipe))
        clips = torch.cat(made)
        extra = {
            "count": count,
            "steps": steps,
            "first_frame_db": round(psnr(clips[:, :, 0], true[:, :, 0]), 2),
            "autoencoder_db": round(psnr(limit[:, :, 0].clamp(-1, 1), true[:, :, 0]), 2),
            "seconds": round(time.monotonic() - start, 1),
        }
        if last:
            extra["last_frame_db"] = round(psnr(clips[:, :, -1], true[:, :, -1]), 2)
        report_clips(run, f"{'flf2v' if last else 'i2v'}_cfg{cfg_scale:g}", clips, pairs, extra)
