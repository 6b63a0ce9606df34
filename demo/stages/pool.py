"""Stage 2: captioned clips, encoded once. The transformer trains on these latents."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.grammar import Attributes, caption, training_attributes
from demo.stages.run import Run, save_state
from demo.tokenizer import PAD, Tokenizer, make_tokenizer
from demo.world import Clips, Scene, render, scene_of

CAPTIONS = 4  # a clip
TOKENS = 31  # longest caption that training sees, </s> included; the grammar's longest has 25


@dataclass(frozen=True)
class Pool:
    """N clips on the run's device.

    latents: (N, C, T, h, w) float16, model space. coverage: (N, T, h, w) uint8, 255 where the object is at some time.
    ids: (N, CAPTIONS, TOKENS) int16, closed as the tokenizer closes prompts, then padding.
    """

    latents: Tensor
    coverage: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]


def tokenizer_of(run: Run) -> Tokenizer:
    """The run's tokenizer, made at the first call."""
    path = run.state / "spiece.model"
    if not path.exists():
        make_tokenizer(path)
    return Tokenizer(path)


def pad_ids(rows: list[list[int]]) -> Tensor:
    """Ids of different lengths -> (len(rows), TOKENS) int64, padded."""
    longest = max(map(len, rows))
    if longest > TOKENS:
        raise ValueError(f"a caption has {longest} tokens, training takes {TOKENS}")
    return torch.tensor([row + [PAD] * (TOKENS - len(row)) for row in rows])


Ids = Callable[[list[str]], Tensor]
"""n captions -> (n, TOKENS) ids, closed and padded."""


def wan_ids(run: Run) -> Ids:
    """As umT5 reads them."""
    tokenizer = tokenizer_of(run)
    return lambda texts: pad_ids(tokenizer.encode(texts))


def _caption_ids(attributes: list[Attributes], to_ids: Ids, seed: int) -> Tensor:
    rng = random.Random(seed)
    texts = [caption(a, rng) for a in attributes for _ in range(CAPTIONS)]
    return to_ids(texts).unflatten(0, (len(attributes), CAPTIONS)).to(torch.int16)


def latent_coverage(coverage: Tensor, cell: int = 8) -> Tensor:
    """(B, F, H, W) pixel coverage -> (B, T, h, w) uint8: where the object or its edge is during a latent frame.

    cell: pixels a side. Cells of 8 take in their neighbours; larger ones hold the edge already.
    """
    batch, frames = coverage.shape[:2]
    cells = F.max_pool2d(coverage, cell)  # (B, F, h, w)
    cells = torch.cat([cells[:, :1].expand(-1, 4, -1, -1), cells[:, 1:]], 1)
    cells = cells.unflatten(1, ((frames + 3) // 4, 4)).amax(2)
    cells = F.max_pool2d(cells, 3, 1, 1) if cell <= 8 else cells
    return (cells * 255).round().to(torch.uint8).view(batch, -1, *cells.shape[-2:])


Look = Callable[[Scene, Clips], Clips]


def as_drawn(scene: Scene, clips: Clips) -> Clips:
    """Clips as the world draws them."""
    return clips


@torch.no_grad()
def draw_pool(
    run: Run,
    vae: Any,
    count: int,
    seconds: float,
    *,
    after: int = 0,
    look: Look = as_drawn,
    to_ids: Ids | None = None,
) -> Pool:
    """Encode `count` clips, or fewer when the time is over; the same seed and `after` give the same clips.

    after: how many clips there are already; these are others. look: sees every batch, and may change how it looks.
    to_ids: how captions are read; None: as Wan's umT5 does.
    """
    start = time.monotonic()
    generator = run.generator(2 + after)
    attributes = training_attributes(count, seed=run.seed + 777 + after)
    ids = _caption_ids(attributes, to_ids or wan_ids(run), seed=run.seed + 778 + after)
    latents, coverage, done = [], [], 0
    batch = 4 if run.dry else 64
    while done < count and time.monotonic() - start < seconds:
        scene = scene_of(attributes[done : done + batch], run.device)
        drawn = look(scene, render(scene, generator))
        with run.autocast():
            raw = vae.posterior(drawn.frames)[0]
        latents.append(vae.space.normalize(raw).half())
        coverage.append(latent_coverage(drawn.coverage, vae.space.stride[1]))
        done += len(raw)
        if done % (16 * batch) == 0:
            run.synchronize()
    return Pool(torch.cat(latents), torch.cat(coverage), ids[:done].to(run.device))


@torch.no_grad()
def grow_pool(
    run: Run,
    vae: Any,
    pool: Pool | None,
    clips: int,
    seconds: float,
    *,
    look: Look = as_drawn,
    to_ids: Ids | None = None,
) -> Pool:
    """Add clips until there are `clips` or the time is over, and save the pool."""
    start, have = time.monotonic(), len(pool) if pool else 0
    new = draw_pool(run, vae, clips - have, seconds, after=have, look=look, to_ids=to_ids)
    if pool:
        new = Pool(*(torch.cat([getattr(pool, f.name), getattr(new, f.name)]) for f in fields(Pool)))
    probe = new.latents[:2000].float()
    run.report(
        "pool",
        {
            "clips": len(new),
            "seconds": round(time.monotonic() - start, 1),
            "mean_off": round(float(probe.mean((0, 2, 3, 4)).abs().max()), 4),
            "std": [round(float(v), 3) for v in probe.std((0, 2, 3, 4)).aminmax()],
        },
    )
    save_state(pool_path(run), {f.name: getattr(new, f.name).cpu() for f in fields(Pool)})
    return new


def pool_path(run: Run) -> Path:
    """Where the pool rests between invocations."""
    return run.state / "pool.pt"


def load_pool(run: Run) -> Pool | None:
    """The pool of an earlier invocation, or None."""
    if not pool_path(run).exists():
        return None
    saved = torch.load(pool_path(run), map_location=run.device, weights_only=True)
    return Pool(**saved)
