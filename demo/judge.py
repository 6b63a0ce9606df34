"""Does a clip show what its prompt asked for? Nothing here is learnt: the renderer's own shapes are the measure.

`judge` reads a clip without knowing the prompt, `score` compares what it read with the attributes of the prompt.
The command line scores a model folder on the held-out pairs: `python -m demo.judge --help`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.grammar import BACKDROP_COLOURS, BACKDROPS, COLOURS, DIRECTIONS, MOTIONS, SHAPES, Attributes, held_out_pairs
from demo.world import backdrop_palette, direction_vectors, object_palette, scene_of, signed_distance

__all__ = ["Findings", "Scores", "held_out_pairs", "judge", "score"]

_MOTION_NAMES = tuple(MOTIONS)
_CHROMA = 0.36  # max(RGB) - min(RGB): objects have 0.57 and more, backdrops at most 0.23
_COLOUR_REACH = 0.3  # RGB distance beyond which a colour is none of the palette; palette entries are 0.4 apart or more
_BACKDROP_REACH = 0.16  # likewise for backdrops, the nearest two of which are 0.21 apart
_SHAPE_FLOOR = 0.62  # mean overlap with the best template below which a blob is no shape; true clips reach 0.93
_MIN_AREA = 0.004  # share of the frame below which there is no object
_TEMPLATE = 48  # pixels a side
_TEMPLATE_REACH = 1.35  # half the template's width in units of sqrt(area of the shape)


@dataclass(frozen=True)
class Findings:
    """What clips show, (B,) each; indices are into the grammar's tables, -1 for none of them."""

    present: Tensor  # share of the frames that show an object
    colour: Tensor
    shape: Tensor
    overlap: Tensor  # mean intersection over union with the best template of that shape
    motion: Tensor
    backdrop: Tensor  # index into BACKDROPS
    first: Tensor  # backdrop colours; top and bottom of a gradient, any order for stripes
    second: Tensor


@dataclass(frozen=True)
class Scores:
    """Right or wrong, (B,) bool each."""

    colour: Tensor
    direction: Tensor  # only where `has_direction`
    shape: Tensor
    motion: Tensor  # all twelve, the eight directions included
    backdrop: Tensor  # kind and colours
    everything: Tensor
    has_direction: Tensor

    def rates(self) -> dict[str, float]:
        """Share that is right, 0..1; direction over the clips that were asked to go somewhere."""
        named = {f.name: getattr(self, f.name).float() for f in fields(self) if f.name != "has_direction"}
        asked = self.has_direction
        named["direction"] = named["direction"][asked] if asked.any() else torch.zeros(1)
        return {name: round(float(values.mean()), 4) for name, values in named.items()}


@lru_cache(maxsize=4)
def _templates(device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks (N, 48 * 48) of every shape in every orientation, of equal area about their centroid; labels (N,)."""
    side, fine = _TEMPLATE, 256
    masks, labels = [], []
    lines = ((torch.arange(fine) + 0.5) / fine * 2 - 1) * 1.2
    across, down = torch.meshgrid(lines, lines, indexing="xy")
    local = (torch.arange(side) + 0.5) / side * 2 - 1
    for label, name in enumerate(SHAPES):
        inside = (signed_distance(torch.tensor(label), across, down) <= 0).float()
        area = inside.sum() * (2.4 / fine) ** 2
        middle_x, middle_y = (inside * across).sum() / inside.sum(), (inside * down).sum() / inside.sum()
        x, y = torch.meshgrid(*(local * _TEMPLATE_REACH * area.sqrt(),) * 2, indexing="xy")
        turns = 1 if name in ("circle", "ring") else 24
        for turn in range(turns):
            cos, sin = math.cos(2 * math.pi * turn / turns), math.sin(2 * math.pi * turn / turns)
            distance = signed_distance(torch.tensor(label), x * cos + y * sin + middle_x, y * cos - x * sin + middle_y)
            masks.append((distance <= 0).float().flatten())
            labels.append(label)
    return torch.stack(masks).to(device), torch.tensor(labels, device=device)


@dataclass(frozen=True)
class _Blob:
    """The saturated part of each frame."""

    mask: Tensor  # (B, T, H, W) 0 or 1
    area: Tensor  # (B, T) pixels
    x: Tensor  # (B, T) centroid, pixels
    y: Tensor


def _find_blob(rgb: Tensor) -> _Blob:
    chroma = rgb.amax(1) - rgb.amin(1)
    mask = (chroma > _CHROMA).float()
    height, width = mask.shape[-2:]
    area = mask.sum((2, 3))
    xs = torch.arange(width, device=rgb.device) + 0.5
    ys = torch.arange(height, device=rgb.device) + 0.5
    some = area.clamp(min=1)
    return _Blob(mask, area, (mask.sum(2) * xs).sum(-1) / some, (mask.sum(3) * ys).sum(-1) / some)


def _find_colour(rgb: Tensor, mask: Tensor) -> Tensor:
    """Nearest palette colour of the blob's inside, -1 if none is near."""
    inner = -F.max_pool2d(-mask.flatten(0, 1)[:, None], 5, 1, 2)[:, 0].view_as(mask)
    enough = inner.sum((1, 2, 3), keepdim=True) > 50
    inner = torch.where(enough, inner, mask)
    mean = (rgb * inner[:, None]).sum((2, 3, 4)) / inner.sum((1, 2, 3)).clamp(min=1)[:, None]
    distance, colour = torch.cdist(mean, object_palette(rgb.device)).min(1)
    return torch.where(distance < _COLOUR_REACH, colour, -1)


def _cut_out(blob: _Blob, frame: int) -> Tensor:
    """(B, 48 * 48) the frame's mask, moved and scaled as the templates are."""
    height, width = blob.mask.shape[-2:]
    local = (torch.arange(_TEMPLATE, device=blob.mask.device) + 0.5) / _TEMPLATE * 2 - 1
    reach = _TEMPLATE_REACH * blob.area[:, frame].clamp(min=1).sqrt()[:, None] * local
    x = (blob.x[:, frame, None] + reach) / width * 2 - 1
    y = (blob.y[:, frame, None] + reach) / height * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    return (F.grid_sample(blob.mask[:, frame, None], grid, align_corners=False)[:, 0] > 0.5).float().flatten(1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (B, N) with masks (M, N) -> (B, M)."""
    both = a @ b.T
    return both / (a.sum(1, keepdim=True) + b.sum(1) - both).clamp(min=1)


def _find_shape(blob: _Blob) -> tuple[Tensor, Tensor]:
    """The shape whose templates overlap best over five frames, -1 below the floor; and that overlap."""
    masks, labels = _templates(blob.mask.device)
    frames = torch.linspace(0, blob.mask.shape[1] - 1, 5).round().long().tolist()
    votes = torch.zeros(blob.mask.shape[0], len(SHAPES), device=blob.mask.device)
    for frame in frames:
        overlap = _overlap(_cut_out(blob, frame), masks)
        votes += torch.stack([overlap[:, labels == label].amax(1) for label in range(len(SHAPES))], 1)
    best, shape = (votes / len(frames)).max(1)
    return torch.where(best > _SHAPE_FLOOR, shape, -1), best


def _find_motion(blob: _Blob) -> Tensor:
    last = blob.mask.shape[1] - 1
    height, width = blob.mask.shape[-2:]
    shift = torch.stack([(blob.x[:, -1] - blob.x[:, 0]) / width, (blob.y[:, -1] - blob.y[:, 0]) / height], 1)
    distance = shift.norm(dim=1)
    vectors = direction_vectors(shift.device)[: len(DIRECTIONS)]
    motion = (shift @ vectors.T).argmax(1)
    start = _cut_out(blob, 0)
    kept = torch.stack([_overlap_each(start, _cut_out(blob, last * part // 4)) for part in (1, 2, 3, 4)], 1).amin(1)
    growth = blob.area[:, -1] / blob.area[:, 0].clamp(min=1)
    on_the_spot = distance < 0.1  # moving objects go 0.26 of the frame and more
    motion = torch.where(on_the_spot, torch.where(kept < 0.88, _index("spin"), _index("still")), motion)
    nearly = distance < 0.16
    motion = torch.where(nearly & (growth > 1.6), _index("grow"), motion)
    return torch.where(nearly & (growth < 0.625), _index("shrink"), motion)


def _overlap_each(a: Tensor, b: Tensor) -> Tensor:
    both = (a * b).sum(1)
    return both / (a.sum(1) + b.sum(1) - both).clamp(min=1)


def _index(motion: str) -> int:
    return _MOTION_NAMES.index(motion)


def _find_backdrop(rgb: Tensor, blob: _Blob) -> tuple[Tensor, Tensor, Tensor]:
    """Kind and two colours (the same twice if plain) of what the object leaves uncovered, averaged over the frames."""
    palette = backdrop_palette(rgb.device)
    grown = F.max_pool2d(blob.mask.flatten(0, 1)[:, None], 9, 1, 4)[:, 0].view_as(blob.mask)
    count = (1 - grown).sum(1)  # (B, H, W) frames in which a pixel is uncovered
    image = (rgb * (1 - grown)[:, None]).sum(2) / count.clamp(min=1)[:, None]  # (B, 3, H, W)
    seen = (count > 0).float()[:, None]
    total = seen.sum((2, 3)).clamp(min=1)
    mean = (image * seen).sum((2, 3)) / total
    variance = ((image - mean[..., None, None]).square() * seen).sum((1, 2, 3)) / total[:, 0]
    rows = (image * seen).sum(3) / seen.sum(3).clamp(min=1)  # (B, 3, H)
    columns = (image * seen).sum(2) / seen.sum(2).clamp(min=1)  # (B, 3, W)

    def spread(profile: Tensor) -> Tensor:
        return (profile - mean[..., None]).square().sum(1).mean(1)

    by_row, by_column = spread(rows), spread(columns)
    # A gradient climbs once from top to bottom; stripes go up and down.
    climb = (rows[..., -1] - rows[..., 0]).norm(dim=1)
    travel = (rows[..., 1:] - rows[..., :-1]).norm(dim=1).sum(1)
    structured = variance > 0.0012
    gradient = structured & (by_row > by_column) & (climb > 0.7 * travel)
    stripes = torch.where(
        by_column >= by_row, BACKDROPS.index("vertical stripes"), BACKDROPS.index("horizontal stripes")
    )
    kind = torch.where(gradient, BACKDROPS.index("gradient"), torch.where(structured, stripes, 0))

    def nearest(colour: Tensor) -> Tensor:
        distance, index = torch.cdist(colour, palette).min(1)
        return torch.where(distance < _BACKDROP_REACH, index, -1)

    top, bottom, only = nearest(rows[..., :10].mean(2)), nearest(rows[..., -10:].mean(2)), nearest(mean)
    nearest_each = (image[:, None] - palette[None, :, :, None, None]).square().sum(2).argmin(1)  # (B, H, W)
    shares = torch.stack([((nearest_each == i) * seen[:, 0]).sum((1, 2)) for i in range(len(BACKDROP_COLOURS))], 1)
    common = shares.topk(2, dim=1).indices
    first = torch.where(kind == 0, only, torch.where(gradient, top, common[:, 0]))
    second = torch.where(kind == 0, only, torch.where(gradient, bottom, common[:, 1]))
    return kind, first, second


@torch.no_grad()
def judge(clips: Tensor) -> Findings:
    """Read clips (B, 3, T, H, W) in [-1, 1]; T is 5 frames or more."""
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 5:
        raise ValueError(f"clips to judge are (B, 3, T, H, W) with T >= 5, got {tuple(clips.shape)}")
    rgb = ((clips.float() + 1) / 2).clamp(0, 1)
    blob = _find_blob(rgb)
    present = (blob.area > _MIN_AREA * rgb.shape[-1] * rgb.shape[-2]).float().mean(1)
    shape, overlap = _find_shape(blob)
    kind, first, second = _find_backdrop(rgb, blob)
    return Findings(present, _find_colour(rgb, blob.mask), shape, overlap, _find_motion(blob), kind, first, second)


def score(findings: Findings, attributes: Sequence[Attributes]) -> Scores:
    """Compare what clips show with what was asked; a clip without an object in 90 % of its frames gets nothing right
    but its backdrop."""
    if len(attributes) != len(findings.shape):
        raise ValueError(f"{len(findings.shape)} clips were judged, {len(attributes)} attributes given")
    asked = scene_of(attributes, findings.shape.device)
    seen = findings.present > 0.9
    colour = seen & (findings.colour == asked.colour)
    shape = seen & (findings.shape == asked.shape)
    motion = seen & (findings.motion == asked.motion)
    straight = (findings.first == asked.first) & (findings.second == asked.second)
    swapped = (findings.first == asked.second) & (findings.second == asked.first)
    gradient = asked.backdrop == BACKDROPS.index("gradient")
    backdrop = (findings.backdrop == asked.backdrop) & (straight | (swapped & ~gradient))
    has_direction = asked.motion < len(DIRECTIONS)
    return Scores(
        colour, motion & has_direction, shape, motion, backdrop, colour & shape & motion & backdrop, has_direction
    )


def describe(findings: Findings, index: int) -> str:
    """What one clip shows, in words; "?" for what is none of the known."""

    def name(table: Sequence[str], values: Tensor) -> str:
        return table[int(values[index])] if values[index] >= 0 else "?"

    backdrops = tuple(BACKDROP_COLOURS)
    colours = dict.fromkeys(name(backdrops, values) for values in (findings.first, findings.second))
    seen = (name(tuple(COLOURS), findings.colour), name(tuple(SHAPES), findings.shape))
    return " ".join((*seen, name(_MOTION_NAMES, findings.motion), "over", *colours, name(BACKDROPS, findings.backdrop)))


if __name__ == "__main__":
    from demo.report import main

    raise SystemExit(main())
