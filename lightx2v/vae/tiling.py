"""Decoding in tiles that overlap and are blended: less memory, for latents of any size and any decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, T, h, w) to frames (B, 3, 4T - 3, H, W); for a part of a clip or of its frames as for all of it."""

Weigh = Callable[[list[tuple[int, int]]], Iterator[Tensor]]
"""Spans of tiles to the weight of each of their places."""

Stride = tuple[int, int, int]
"""Frames and pixels of a latent cell along (T, H, W)."""

MARGIN = 8  # of an overlap, the part at each end that is not used: what is beside a tile's edge knows least


@dataclass(frozen=True)
class Tiling:
    """Sizes in pixels and frames; whole latent cells of them are used.

    size: a tile's side. overlap: of neighbours, at least. frames: of a tile, 0 for all; VAEs that stream gain nothing
    from less. frame_overlap: how many frames earlier a tile begins, only to know what was before: what a causal VAE
    makes of latents that do not begin a clip is 16 frames later within 1/255 of the truth (dev/LOG.md).
    """

    size: int = 256
    overlap: int = 64
    frames: int = 0
    frame_overlap: int = 16

    def __post_init__(self) -> None:
        for name, low in (("size", 32), ("overlap", 0), ("frames", 0), ("frame_overlap", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"a tile's {name} is {getattr(self, name)}: expected at least {low}")
        if self.overlap > self.size // 2:
            raise ValueError(
                f"tiles of {self.size} pixels overlap by {self.overlap}: expected at most half of the size"
            )
        if self.frames and self.frame_overlap + 4 > self.frames:
            raise ValueError(
                f"tiles of {self.frames} frames overlap by {self.frame_overlap}: expected 0 (no tiles in time) or at "
                f"least {self.frame_overlap + 4}"
            )


@dataclass(frozen=True)
class Axis:
    """Where the tiles lie along one axis.

    cells: start and end of each in latent cells. spans: in frames or pixels. weights: of each of those, 0 to 1; over
    all tiles they add up to 1 everywhere.
    """

    cells: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    weights: tuple[Tensor, ...]


def decode_tiled(
    decode: Decode,
    raw: Tensor,
    stride: Stride,
    tiling: Tiling,
    *,
    out: Tensor | None = None,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Frames (B, 3, F, H, W) float32 of raw latents (B, C, T, h, w), tile by tile.

    They are added up in `out`, in main memory unless given. on_tile is called after each tile with the number of those
    done and of all; what it raises ends the work.
    """
    if raw.ndim != 5 or not raw.numel():
        raise ValueError(f"latents are {tuple(raw.shape)}; expected (B, C, T, h, w), T, h and w at least 1")
    axes = plan(raw.shape[2:], stride, tiling)
    size = (raw.shape[0], 3, *(axis.spans[-1][1] for axis in axes))
    if out is None:
        out = torch.empty(size, dtype=torch.float32)
    elif tuple(out.shape) != size:
        raise ValueError(f"out is {tuple(out.shape)}; these latents decode to {size}")
    out.zero_()
    tiles = _places(axes)
    for done, places in enumerate(tiles, 1):
        chosen = list(zip(axes, places, strict=True))
        frames = decode(_part(raw, [axis.cells[place] for axis, place in chosen]))
        part = _part(out, [axis.spans[place] for axis, place in chosen])
        if frames.shape != part.shape:
            raise ValueError(f"a tile decoded to {tuple(frames.shape)}; expected {tuple(part.shape)}")
        time, rows, columns = (axis.weights[place].to(part.device) for axis, place in chosen)
        part += frames.to(part.device, torch.float32) * (time[:, None, None] * rows[:, None] * columns)
        if on_tile is not None:
            on_tile(done, len(tiles))
    return out


def tiles_of(raw: Tensor, stride: Stride, tiling: Tiling) -> list[Tensor]:
    """The latents of each tile, in the order in which `decode_tiled` decodes them."""
    axes = plan(raw.shape[2:], stride, tiling)
    return [
        _part(raw, [axis.cells[place] for axis, place in zip(axes, places, strict=True)]) for places in _places(axes)
    ]


def _places(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Of each tile its place along every axis."""
    return list(product(*(range(len(axis.cells)) for axis in axes)))


def _part(video: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """A view of what lies between start and end along each of the last three axes."""
    time, rows, columns = (slice(*span) for span in spans)
    return video[..., time, rows, columns]


def largest_tile(shape: Sequence[int], stride: Stride, tiling: Tiling) -> tuple[int, int, int]:
    """(T, h, w) of the largest tile of latents (T, h, w)."""
    time, rows, columns = (max(stop - start for start, stop in axis.cells) for axis in plan(shape, stride, tiling))
    return time, rows, columns


def plan(shape: Sequence[int], stride: Stride, tiling: Tiling) -> tuple[Axis, Axis, Axis]:
    """The tiles of latents (T, h, w), along each axis."""
    t, h, w = shape
    frames = (tiling.frames - 1) // stride[0] + 1 if tiling.frames else t
    steps = (max(frames, 2), max(-(-tiling.frame_overlap // stride[0]), 1))
    times = _cells(t, *steps)
    # A tile's first latent frame becomes the last of the frames that it stands for: 4 s of those 4 s - 3 to 4 s.
    time = _axis(times, [(stride[0] * s, stride[0] * (e - 1) + 1) for s, e in times], _switches)
    sides = []
    for count, cell in ((h, stride[1]), (w, stride[2])):
        cells = _cells(count, max(tiling.size // cell, 2), -(-tiling.overlap // cell))
        sides.append(_axis(cells, [(cell * s, cell * e) for s, e in cells], _ramps))
    return time, sides[0], sides[1]


def _cells(count: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Tiles of `size` cells that cover `count`, evenly spread, neighbours sharing at least `overlap`."""
    if count <= size:
        return [(0, count)]
    overlap = min(overlap, size - 1)
    pieces = -(-(count - overlap) // (size - overlap))
    starts = [round(index * (count - size) / (pieces - 1)) for index in range(pieces)]
    return [(start, start + size) for start in starts]


def _axis(cells: list[tuple[int, int]], spans: list[tuple[int, int]], weigh: Weigh) -> Axis:
    weights = list(weigh(spans))
    total = torch.zeros(spans[-1][1])
    for (start, stop), weight in zip(spans, weights, strict=True):
        total[start:stop] += weight
    shares = tuple(weight / total[start:stop] for (start, stop), weight in zip(spans, weights, strict=True))
    return Axis(tuple(cells), tuple(spans), shares)


def _switches(spans: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Each tile from where the one before it ends: until then that one knows more of the past."""
    before = 0
    for start, stop in spans:
        yield (torch.arange(start, stop) >= before).float()
        before = stop


def _ramps(spans: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Of each tile: 1 where it is alone, and straight lines down to 0 at `MARGIN` from its ends in an overlap."""
    for index, (start, stop) in enumerate(spans):
        ramp = torch.ones(stop - start)
        places = torch.arange(start, stop) + 0.5
        if index:
            ramp = ramp * _rise(places - start, spans[index - 1][1] - start)
        if index + 1 < len(spans):
            ramp = ramp * _rise(stop - places, stop - spans[index + 1][0])
        yield ramp


def _rise(distance: Tensor, overlap: int) -> Tensor:
    """From 0 to 1 over an overlap, by the distance from its start, less the margins where there is room for them."""
    if overlap <= 0:
        return torch.ones_like(distance)
    margin = min(MARGIN, overlap // 4)
    return ((distance - margin) / (overlap - 2 * margin)).clamp(0, 1)
