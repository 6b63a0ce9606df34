"""A tiny autoencoder's decoder, taught by the full one: what TAEHV is to Wan's VAE, a narrow one is to the demo's.

    python -m demo.stages.tae --seconds 700      # one thread of a CPU is enough; --dry for a second's trial

Writes demo/models/variants/taew2_1_demo.safetensors and prints, as one line of JSON, how near it comes to the full
decode and what the judge reads in both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.judge import judge, score
from demo.optim import Optimizer, Settings, plateau
from demo.stages.export import VAE, export_tae
from demo.world import attributes_of, render, sample_scene
from lightx2v.vae.loading import identify_vae, load_vae
from lightx2v.vae.stream import StreamedVAE, decode, encode
from lightx2v.vae.tae import Remember, TAEConfig, TinyVAE

MODEL = Path(__file__).parents[1] / "models" / "wan2.1_t2v"
OUT = MODEL.parent / "variants" / "taew2_1_demo.safetensors"
CONFIG = TAEConfig("taew2_1", decoder_channels=(24, 18, 14, 12), encoder_channels=None)
SETTINGS = Settings(rate=2e-3, matrix_rate=2e-3, average=0.995)
CELL = 8  # pixels of a latent cell


@dataclass(frozen=True)
class Phase:
    """Windows of so many latent cells a side, a batch of them, until a share of the time has passed."""

    window: int
    batch: int
    until: float


PHASES = (Phase(8, 4, 0.75), Phase(16, 1, 1.0))


@dataclass(frozen=True)
class Lessons:
    """Raw latents (N, 16, 5, 16, 16) and the full VAE's frames for them (N, 3, 17, 128, 128), float16."""

    latents: Tensor
    frames: Tensor

    def draw(self, phase: Phase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of windows, of two chances each the one with more in it: latents, frames."""
        latents, frames = [], []
        for _ in range(phase.batch):
            chances = [self._window(phase.window, generator) for _ in range(2)]
            best = max(chances, key=lambda pair: float(pair[1].std()))
            latents.append(best[0])
            frames.append(best[1])
        return torch.stack(latents).float(), torch.stack(frames).float()

    def _window(self, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        room = self.latents.shape[-1] - side + 1
        clip = int(torch.randint(len(self.latents), (), generator=generator))
        y, x = torch.randint(room, (2,), generator=generator).tolist()
        frames = self.frames[clip, ..., CELL * y : CELL * (y + side), CELL * x : CELL * (x + side)]
        return self.latents[clip, ..., y : y + side, x : x + side], frames


def make_lessons(vae: StreamedVAE, generator: torch.Generator, seconds: float) -> Lessons:
    """Rendered clips through the full VAE and back, as many as the time allows."""
    latents, frames, start = [], [], time.monotonic()
    while not latents or time.monotonic() - start < seconds:
        raw = encode(vae, render(sample_scene(1, generator), generator).frames)
        latents.append(raw.half())
        frames.append(decode(vae, raw).half())
    return Lessons(torch.cat(latents), torch.cat(frames))


def new_tae(generator: torch.Generator) -> TinyVAE:
    """Fresh weights: variance kept through the ReLUs, branches at 0.3 of their input."""
    tae = TinyVAE(CONFIG)
    for module in tae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in tae.modules():
            if isinstance(module, Remember):
                module.conv[-1].weight.mul_(0.3)
        tae.decoder[-1].weight.mul_(0.3)
        tae.decoder[-1].bias.fill_(0.5)  # of [0, 1]
    return tae


def is_matrix(name: str, weight: Tensor) -> bool:
    """Kernels to orthogonalise: all but those that read latents and make pixels."""
    return weight.ndim == 4 and name not in ("decoder.1.weight", "decoder.22.weight")


def _loss(tae: TinyVAE, raw: Tensor, frames: Tensor, margin: int) -> Tensor:
    """margin: pixels at the sides of a window that its neighbours would have told more about."""
    inner = slice(margin, -margin or None)
    error = (tae.reconstruct(raw) - frames)[..., inner, inner]
    return error.abs().mean() + 4 * error.square().mean()


def train(lessons: Lessons, generator: torch.Generator, seconds: float) -> TinyVAE:
    """Fit for so many seconds; returns the averaged weights."""
    tae = new_tae(generator)
    optimizer = Optimizer(tae.named_parameters(), SETTINGS, is_matrix)
    start, total = time.monotonic(), 0.0
    whole = lessons.latents.shape[-1]
    while (progress := (time.monotonic() - start) / seconds) < 1:
        phase = next(p for p in PHASES if progress < p.until)
        raw, frames = lessons.draw(phase, generator)
        loss = _loss(tae, raw, frames, 0 if phase.window == whole else CELL)
        loss.backward()
        optimizer.step(plateau(progress, warm=0.02, decay=0.5))
        total += float(loss.detach())
        if optimizer.steps % 100 == 0:
            print(f"{optimizer.steps} loss {total / 100:.4f} at {time.monotonic() - start:.0f} s", file=sys.stderr)
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss is {total} after {optimizer.steps} steps")
            total = 0.0
    tae.load_state_dict(optimizer.averaged())
    return tae.eval().requires_grad_(False)


def compare(vae: StreamedVAE, tae: StreamedVAE, count: int, seed: int = 90) -> dict[str, float | dict[str, float]]:
    """Of fresh clips: dB between tiny and full decode, what the judge reads in both, and seconds a clip of each."""
    generator = torch.Generator().manual_seed(seed)
    scene = sample_scene(count, generator)
    latents = [encode(vae, clip) for clip in render(scene, generator).frames.split(1)]
    made, seconds = {}, {}
    for name, network in (("full", vae), ("tiny", tae)):
        start = time.monotonic()
        made[name] = torch.cat([decode(network, raw) for raw in latents])
        seconds[name] = round((time.monotonic() - start) / count, 3)
    psnr = 10 * torch.log10(4 / (made["tiny"] - made["full"]).square().mean((1, 2, 3, 4)))
    rates = {name: score(judge(clips), attributes_of(scene)).rates() for name, clips in made.items()}
    return {"clips": count, "psnr_db": round(float(psnr.mean()), 2), "seconds": seconds, **rates}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m demo.stages.tae", description="Teach a tiny decoder.")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with the full VAE")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=700, help="of a quarter the lessons are made")
    parser.add_argument("--count", type=int, default=48, help="clips to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="everything in miniature")
    args = parser.parse_args(argv)
    if args.dry:
        args.seconds, args.count = 1.0, 1
    generator = torch.Generator().manual_seed(args.seed)
    vae = load_vae(identify_vae(args.model / VAE), dtype=torch.float32, device="cpu")
    lessons = make_lessons(vae, generator, args.seconds / 4)
    print(f"{len(lessons.latents)} clips", file=sys.stderr)
    export_tae(train(lessons, generator, args.seconds * 3 / 4), args.out)
    tae = load_vae(identify_vae(args.out), dtype=torch.float32, device="cpu")
    print(json.dumps({"bytes": args.out.stat().st_size, **compare(vae, tae, args.count)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
