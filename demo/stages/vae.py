"""Stage 1: the autoencoder, in the engine's own network of a family at a small part of its width. Here: Wan2.1's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demo.judge import judge, score
from demo.optim import Optimizer, Settings, plateau
from demo.stages.lean import choose_forms, make_lean
from demo.stages.loop import capture
from demo.stages.run import Run, save_state
from demo.world import (
    FRAMES,
    HEIGHT,
    WIDTH,
    Paint,
    Scene,
    Window,
    attributes_of,
    draw,
    mix_paint,
    place,
    render,
    sample_scene,
    whole,
)
from lightx2v.latents import WAN21
from lightx2v.vae.stream import arrange
from lightx2v.vae.wan import AttentionBlock, ResidualBlock, WanVAE, WanVAEConfig

BASE_CHANNELS = 16  # 96 in Wan2.1
SETTINGS = Settings(rate=2e-3, matrix_rate=1.2e-3, average=0.998)
KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class Phase:
    """Part of the training: windows of (T, H, W) pixels, a batch of them, until a share of the time has passed."""

    window: tuple[int, int, int]
    batch: int
    until: float


PHASES = (Phase((5, 32, 32), 32, 0.2), Phase((9, 64, 64), 20, 0.75), Phase((FRAMES, HEIGHT, WIDTH), 5, 1.0))
DRY_PHASES = (Phase((5, 32, 32), 2, 0.7), Phase((5, 64, 64), 1, 1.0))


@dataclass(frozen=True)
class Autoencoder:
    """What a family's autoencoder is, to this stage.

    empty: the network. start: sets fresh weights. is_matrix: see demo.optim. speed_up: takes faster forms of layers.
    settle: gives the latents of the trained network the statistics that engines assume, from their mean and std.
    pull: loss weight of those statistics, where nothing could settle them later. graph: train as CUDA graphs.
    round: after every step, keeps of the weights what the file will.
    """

    empty: Callable[[], Any]
    start: Callable[[Any, torch.Generator], None]
    is_matrix: Callable[[str, Tensor], bool]
    speed_up: Callable[[Any, Run], None]
    settle: Callable[[Any, Tensor, Tensor], None]
    pull: float = 0.0
    phases: tuple[Phase, ...] = PHASES
    graph: bool = False
    round: Callable[[Any], None] = lambda vae: None


def start_convolutions(vae: nn.Module, generator: torch.Generator) -> None:
    """torch's own initialisation would let the biases drown the signal under the RMS norms."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=generator)
            nn.init.zeros_(module.bias)


def new_vae(device: torch.device, generator: torch.Generator) -> WanVAE:
    """Wan's, with fresh weights."""
    vae = WAN.empty().to(device)
    WAN.start(vae, generator)
    return arrange(vae)


def _empty() -> WanVAE:
    return WanVAE(WanVAEConfig(base_channels=BASE_CHANNELS))


def _start(vae: WanVAE, generator: torch.Generator) -> None:
    start_convolutions(vae, generator)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResidualBlock):
                module.residual[-1].weight.mul_(0.3)
            elif isinstance(module, AttentionBlock):
                module.proj.weight.zero_()
        # Start almost without posterior noise, or nothing is learnt.
        vae.conv1.bias[vae.config.latent_channels :] = -5.0


def is_matrix(name: str, weight: Tensor) -> bool:
    """Kernels wide enough to be orthogonalised."""
    return (
        weight.ndim >= 4
        and min(weight.shape[0], weight[0].numel()) >= 16
        and "gamma" not in name
        and name != "encoder.conv1.weight"
    )


def _choose_window(
    scene: Scene, x: Tensor, y: Tensor, size: tuple[int, int, int], generator: torch.Generator
) -> Window:
    """Where to look: mostly near the object (x, y as (B, T) pixels)."""
    frames, height, width = size
    count, device = len(scene), x.device

    def uniform(scale: float = 1.0) -> Tensor:
        return torch.rand(count, device=device, generator=generator) * scale

    start = (uniform() * (FRAMES - frames + 1)).long()
    time_index = start[:, None] + torch.arange(frames, device=device)
    middle = time_index[:, frames // 2, None]
    near = uniform() < 0.75

    def corner(path: Tensor, extent: int, whole_extent: int) -> Tensor:
        about = path.gather(1, middle)[:, 0] + (uniform() - 0.5) * extent
        centre = torch.where(near, about, uniform(whole_extent))
        return (centre - extent / 2).clamp(0, whole_extent - extent).floor()

    left, top = corner(x, width, WIDTH), corner(y, height, HEIGHT)
    return Window(
        time=time_index,
        ys=top[:, None] + torch.arange(height, device=device) + 0.5,
        xs=left[:, None] + torch.arange(width, device=device) + 0.5,
    )


def training_clips(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Clips (B, 3, *size) in [-1, 1]. Three in ten have random colours and tilts; one in twelve shows only its first
    (or first and last) frames, gray between, which is what image-to-video models have encoded."""
    scene = sample_scene(count, generator)
    device = generator.device
    track = place(scene, generator, frames=FRAMES, height=HEIGHT, width=WIDTH)
    paint = mix_paint(scene, generator, side=min(HEIGHT, WIDTH))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device, generator=generator)

    wild = uniform() < 0.3
    paint = Paint(
        object=torch.where(wild[:, None], uniform(3), paint.object),
        first=torch.where(wild[:, None], uniform(3), paint.first),
        second=torch.where(wild[:, None], uniform(3), paint.second),
        tilt=torch.where(wild, (uniform() - 0.5) * 2 * math.pi, paint.tilt),
        period=paint.period,
        phase=paint.phase,
    )
    if size == (FRAMES, HEIGHT, WIDTH):
        window = whole(count, frames=FRAMES, height=HEIGHT, width=WIDTH, device=device)
    else:
        window = _choose_window(scene, track.x, track.y, size, generator)
    clips = draw(scene, track, paint, window, height=HEIGHT, width=WIDTH).frames
    chance = uniform()
    end = torch.where(chance < 0.04, 0, 1)
    middle_gray = (chance < 0.08).view(-1, 1, 1, 1, 1)
    clips[:, :, 1:-1] = torch.where(middle_gray, 0.0, clips[:, :, 1:-1])
    clips[:, :, -1:] = torch.where(middle_gray & (end == 0).view(-1, 1, 1, 1, 1), 0.0, clips[:, :, -1:])
    return clips


def _difference_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 between the steps from pixel to pixel and frame to frame: keeps edges sharp."""
    return sum((torch.diff(made, dim=d) - torch.diff(true, dim=d)).abs().mean() for d in (2, 3, 4)) / 3


def _strangeness(latents: Tensor, std: float) -> Tensor:
    """How far the channels' statistics are from mean 0 and `std`."""
    values = latents.float().transpose(0, 1).flatten(1) / std
    return (values.mean(1).square() + (values.std(1) - 1).square()).mean()


def _loss(vae: Any, clips: Tensor, generator: torch.Generator, run: Run, pull: float = 0.0) -> tuple[Tensor, Tensor]:
    with run.autocast():
        mean, log_variance = vae.posterior(clips)
        log_variance = log_variance.clamp(-12, 4)
        noise = torch.randn(mean.shape, device=mean.device, generator=generator)
        made = vae.reconstruct(mean + noise * torch.exp(0.5 * log_variance)).float()
    absolute = (made - clips).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    # The square term finds the colours sooner than L1 alone.
    loss = absolute + 4 * (made - clips).square().mean() + 0.5 * _difference_loss(made, clips) + KL_WEIGHT * divergence
    if pull:
        loss = loss + pull * _strangeness(mean, vae.space.std[0])
    return loss, absolute.detach()


@torch.no_grad()
def fold_statistics(vae: WanVAE, mean: Tensor, std: Tensor) -> None:
    """Rescale conv1 and conv2 so that raw latents with the measured (16,) mean and std get exactly Wan2.1's.

    Engines hard-code those. Both convolutions are 1x1x1 and next to the latents, so reconstructions do not change.
    """
    z = vae.config.latent_channels
    scale = torch.tensor(WAN21.std, device=mean.device) / std
    shift = torch.tensor(WAN21.mean, device=mean.device) - scale * mean
    weight, bias = vae.conv1.weight, vae.conv1.bias
    weight[:z] *= scale.view(-1, 1, 1, 1, 1)
    bias[:z] = bias[:z] * scale + shift
    bias[z:] += 2 * torch.log(scale)
    weight, bias = vae.conv2.weight, vae.conv2.bias
    bias -= (weight[:, :, 0, 0, 0] * (shift / scale)).sum(1)
    weight /= scale.view(1, -1, 1, 1, 1)


@torch.no_grad()
def measure_latents(vae: Any, run: Run, generator: torch.Generator, batches: int, batch: int) -> tuple[Tensor, Tensor]:
    """Per-channel mean and std of the raw latents of rendered clips."""
    means = []
    for _ in range(batches):
        clips = render(sample_scene(batch, generator), generator).frames
        with run.autocast():
            means.append(vae.posterior(clips)[0].transpose(0, 1).flatten(1))
    values = torch.cat(means, 1)
    return values.mean(1), values.std(1).clamp(min=1e-3)


@torch.no_grad()
def report_vae(vae: Any, run: Run, count: int) -> None:
    """PSNR of reconstructions, and whether the judge still reads them."""
    generator = run.generator(90)
    scene = sample_scene(count, generator)
    clips = render(scene, generator).frames
    made = []
    for part in clips.split(8):
        with run.autocast():
            made.append(vae.reconstruct(vae.posterior(part)[0]).float().clamp(-1, 1))
    made = torch.cat(made)
    psnr = 10 * torch.log10(4 / (made - clips).square().mean((1, 2, 3, 4)))
    rates = score(judge(made), attributes_of(scene)).rates()
    run.report("vae_quality", {"clips": count, "psnr_db": round(float(psnr.mean()), 2), **rates})


def speed_up(vae: WanVAE, run: Run) -> None:
    """On a GPU, take the layers' fast forms (see demo.stages.lean)."""
    if run.device.type == "cuda":
        base = BASE_CHANNELS
        forms = choose_forms(((base, 64, 9), (base * 2, 32, 9), (base * 4, 16, 5)), run.device)
        make_lean(vae, forms)
        run.log(f"convolution forms {forms}")


WAN = Autoencoder(_empty, _start, is_matrix, speed_up, fold_statistics)


def _repeated(
    vae: Any, optimizer: Optimizer, run: Run, kind: Autoencoder, generator: torch.Generator
) -> Callable[[Phase, Callable[[], None]], Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """For each phase a step on a batch of clips, after `prepare`: error and the gradients' norm. As a CUDA graph, where
    the kind asks for it, it reads the clips from one place."""

    def work(clips: Tensor) -> tuple[Tensor, Tensor]:
        loss, absolute = _loss(vae, clips, generator, run, kind.pull)
        loss.backward()
        norm = optimizer.apply()
        kind.round(vae)
        return absolute, norm

    def captured(phase: Phase, prepare: Callable[[], None]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        if not kind.graph or not run.compile:
            return work
        place = training_clips(phase.batch, phase.window, run.generator(7))
        replay = capture(lambda: work(place), prepare, generator)

        def step(clips: Tensor) -> tuple[Tensor, Tensor]:
            place.copy_(clips)
            return replay()

        return step

    return captured


def train_vae(run: Run, seconds: float, kind: Autoencoder = WAN) -> Any:
    """Train for `seconds`, settle the latents' statistics, save to state/vae.pt."""
    generator = run.generator(1)
    vae = kind.empty().to(run.device)
    kind.start(vae, generator)
    arrange(vae)
    kind.speed_up(vae, run)
    optimizer = Optimizer(vae.named_parameters(), SETTINGS, kind.is_matrix)
    phases = DRY_PHASES if run.dry else kind.phases
    start, total, count = time.monotonic(), torch.zeros((), device=run.device), 0
    begin, phase, step = _repeated(vae, optimizer, run, kind, run.generator(6)), None, None

    def share() -> float:
        return (time.monotonic() - start) / seconds

    def prepare() -> None:
        optimizer.prepare(plateau(share(), warm=0.03, decay=0.45))

    while (progress := share()) < 1:
        now = next(p for p in phases if progress < p.until)
        if now is not phase or step is None:
            phase, step = now, begin(now, prepare)
        clips = training_clips(phase.batch, phase.window, generator)
        prepare()
        absolute, norm = step(clips)
        total += absolute
        count += 1
        if optimizer.steps % 16 == 0:
            run.synchronize()
        if optimizer.steps in (1, 20, 100) or optimizer.steps % 200 == 0:
            mean = float(total) / count
            run.log(f"vae {optimizer.steps} {phase.window} l1 {mean:.4f} norm {float(norm):.2f} at {share():.0%}")
            if not math.isfinite(mean):
                raise FloatingPointError(f"the autoencoder's loss is {mean} after {optimizer.steps} steps")
            total, count = torch.zeros_like(total), 0
    vae.load_state_dict(optimizer.averaged())
    kind.round(vae.eval().requires_grad_(False))
    kind.settle(vae, *measure_latents(vae, run, generator, *((1, 2) if run.dry else (16, 48))))
    run.report("vae_train", {"steps": optimizer.steps, "seconds": round(time.monotonic() - start, 1)})
    save_state(run.state / "vae.pt", vae.state_dict())
    report_vae(vae, run, 1 if run.dry else 96)
    return vae


def load_vae(run: Run, kind: Autoencoder = WAN) -> Any:
    """The autoencoder of an earlier invocation, or None."""
    path = run.state / "vae.pt"
    if not path.exists():
        return None
    vae = kind.empty().to(run.device)
    vae.load_state_dict(torch.load(path, map_location=run.device, weights_only=True))
    kind.speed_up(vae, run)
    return vae.eval().requires_grad_(False)
