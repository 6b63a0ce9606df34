"""The renderer of the demo clips: pure torch, batched, drawn from signed distances so that edges are smooth.

The words of a clip are `demo.grammar`; here its values become indices and its indices become frames. Lengths are shares
of the shorter side of the frame until `place` turns them into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.grammar import (
    BACKDROP_COLOURS,
    BACKDROP_WEIGHTS,
    BACKDROPS,
    COLOURS,
    DIRECTIONS,
    MOTION_WEIGHTS,
    MOTIONS,
    SHAPES,
    SIZE_WEIGHTS,
    SIZES,
    SPINNABLE,
    Attributes,
)

FRAMES, HEIGHT, WIDTH, FPS = 17, 128, 128, 16

# 0..255 RGB. Objects are saturated, backdrops are not: the judge tells them apart by max(RGB) - min(RGB).
_OBJECT_RGB = {
    "red": (225, 25, 35),
    "orange": (255, 130, 0),
    "yellow": (250, 230, 40),
    "green": (30, 175, 60),
    "cyan": (30, 210, 225),
    "blue": (40, 70, 235),
    "purple": (135, 40, 195),
    "pink": (255, 110, 190),
}
_BACKDROP_RGB = {
    "black": (14, 14, 16),
    "white": (242, 242, 240),
    "gray": (128, 128, 128),
    "navy": (38, 48, 96),
    "olive": (96, 100, 58),
    "brown": (104, 70, 52),
}
_DIAGONAL = math.sqrt(0.5)
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_SHAPE_NAMES, _MOTION_NAMES, _SIZE_NAMES = tuple(SHAPES), tuple(MOTIONS), tuple(SIZES)
_SPIN, _GROW, _SHRINK = (_MOTION_NAMES.index(name) for name in ("spin", "grow", "shrink"))


def object_palette(device: torch.device | str = "cpu") -> Tensor:
    """(colours, 3) in [0, 1], in the order of grammar.COLOURS."""
    return torch.tensor([_OBJECT_RGB[name] for name in COLOURS], dtype=torch.float32, device=device) / 255


def backdrop_palette(device: torch.device | str = "cpu") -> Tensor:
    """(backdrop colours, 3) in [0, 1], in the order of grammar.BACKDROP_COLOURS."""
    return torch.tensor([_BACKDROP_RGB[name] for name in BACKDROP_COLOURS], dtype=torch.float32, device=device) / 255


def direction_vectors(device: torch.device | str = "cpu") -> Tensor:
    """(motions, 2) unit steps (x right, y down) in the order of grammar.MOTIONS; zero for motions on the spot."""
    rows = []
    for motion in _MOTION_NAMES:
        x = y = 0.0
        if motion in DIRECTIONS:
            x, y = (sum(_STEP[part][axis] for part in motion.split()) for axis in (0, 1))
            if x and y:
                x, y = x * _DIAGONAL, y * _DIAGONAL
        rows.append((x, y))
    return torch.tensor(rows, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Scene:
    """Attributes of B clips as indices into the grammar's tables, (B,) int64 each."""

    shape: Tensor
    colour: Tensor
    motion: Tensor
    backdrop: Tensor
    first: Tensor
    second: Tensor
    size: Tensor

    def __len__(self) -> int:
        return self.shape.shape[0]


def scene_of(attributes: Sequence[Attributes], device: torch.device | str = "cpu") -> Scene:
    """Attributes as indices."""
    colours, backdrops = list(COLOURS), list(BACKDROP_COLOURS)
    rows = [
        (
            _SHAPE_NAMES.index(a.shape),
            colours.index(a.colour),
            _MOTION_NAMES.index(a.motion),
            BACKDROPS.index(a.backdrop),
            backdrops.index(a.backdrop_colours[0]),
            backdrops.index(a.backdrop_colours[-1]),
            _SIZE_NAMES.index(a.size),
        )
        for a in attributes
    ]
    return Scene(*torch.tensor(rows, dtype=torch.int64, device=device).unbind(1))


def attributes_of(scene: Scene) -> list[Attributes]:
    """The inverse of `scene_of`."""
    colours, backdrops = list(COLOURS), list(BACKDROP_COLOURS)
    result = []
    columns = (scene.shape, scene.colour, scene.motion, scene.backdrop, scene.first, scene.second, scene.size)
    for shape, colour, motion, backdrop, first, second, size in torch.stack(columns, 1).tolist():
        painted = (backdrops[first],) if BACKDROPS[backdrop] == "plain" else (backdrops[first], backdrops[second])
        words = (
            _SHAPE_NAMES[shape],
            colours[colour],
            _MOTION_NAMES[motion],
            BACKDROPS[backdrop],
            painted,
            _SIZE_NAMES[size],
        )
        result.append(Attributes(*words))
    return result


def sample_scene(count: int, generator: torch.Generator) -> Scene:
    """Draw B scenes on the generator's device, with the grammar's frequencies."""
    device = generator.device

    def index(options: int) -> Tensor:
        return torch.randint(options, (count,), device=device, generator=generator)

    def weighted(weights: Sequence[float]) -> Tensor:
        return torch.multinomial(torch.tensor(weights, device=device), count, True, generator=generator)

    motion = weighted(MOTION_WEIGHTS)
    spinnable = torch.tensor([_SHAPE_NAMES.index(name) for name in SPINNABLE], device=device)
    shape = torch.where(motion == _SPIN, spinnable[index(len(SPINNABLE))], index(len(SHAPES)))
    first = index(len(BACKDROP_COLOURS))
    second = (first + 1 + index(len(BACKDROP_COLOURS) - 1)) % len(BACKDROP_COLOURS)
    size = torch.where((motion == _GROW) | (motion == _SHRINK), 0, weighted(SIZE_WEIGHTS))
    return Scene(shape, index(len(COLOURS)), motion, weighted(BACKDROP_WEIGHTS), first, second, size)


def signed_distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance (negative inside) from each shape's edge at local coordinates u (right), v (down) in radii.

    shape: indices that broadcast with u and v. Distances are exact near straight edges, which is where they are used.
    """
    radius = torch.sqrt(u * u + v * v + 1e-12)
    across, along = u.abs(), v.abs()
    slant = math.sqrt(0.75)
    arm = 0.32
    distances = {
        "circle": radius - 0.92,
        "square": torch.maximum(across, along) - 0.82,
        # centroid at the origin, tip up, corners at radius 1.15
        "triangle": torch.maximum(v, slant * across - 0.5 * v) - 0.575,
        "ring": (radius - 0.7).abs() - 0.25,
        "cross": torch.minimum(torch.maximum(across - 1.0, along - arm), torch.maximum(across - arm, along - 1.0)),
    }
    result = distances[_SHAPE_NAMES[0]]
    for index, name in enumerate(_SHAPE_NAMES[1:], start=1):
        result = torch.where(shape == index, distances[name], result)
    return result


@dataclass(frozen=True)
class Track:
    """Where the object is: centre x, y and radius in pixels, angle in radians, (B, T) each."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def place(scene: Scene, generator: torch.Generator, *, frames: int, height: int, width: int) -> Track:
    """Choose sizes, speeds and paths; every path stays inside the frame."""
    device = scene.shape.device
    count = len(scene)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device, generator=generator)

    side = float(min(height, width))
    radius = side * torch.where(scene.size == 0, uniform(0.205, 0.245), uniform(0.27, 0.3))
    step = direction_vectors(device)[scene.motion]
    extent = step * (uniform(0.26, 0.36) * side)[:, None]
    growth = torch.sqrt(uniform(1.8, 2.2))
    growth = torch.where(scene.motion == _GROW, growth, torch.where(scene.motion == _SHRINK, 1 / growth, 1.0))
    start, end = radius / growth, radius * growth

    # corners of a triangle reach 1.15 radii, those of a spinning square 1.16
    reach = torch.maximum(start, end)[:, None] * 1.16
    limit = torch.tensor([width, height], dtype=torch.float32, device=device)
    low = torch.maximum(reach, reach - extent)
    high = torch.minimum(limit - reach, limit - reach - extent)
    middle = (limit - extent) / 2
    low, high = torch.where(low < high, low, middle), torch.where(low < high, high, middle)
    origin = low + (high - low) * uniform(0, 1, 2)

    spinning = scene.motion == _SPIN
    turn = uniform(1.1, 1.5) * torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    time = torch.linspace(0, 1, frames, device=device)
    path = origin[:, None] + extent[:, None] * time[:, None]
    return Track(
        x=path[..., 0],
        y=path[..., 1],
        radius=start[:, None] + (end - start)[:, None] * time,
        angle=torch.where(spinning, turn, 0.0)[:, None] * time,
    )


@dataclass(frozen=True)
class Paint:
    """Colours in [0, 1], (B, 3) each, and the backdrop's tilt in radians and stripe geometry, (B,) each."""

    object: Tensor
    first: Tensor
    second: Tensor
    tilt: Tensor
    period: Tensor
    phase: Tensor


def mix_paint(scene: Scene, generator: torch.Generator, *, side: int) -> Paint:
    """The palette's colours; stripes are 0.24 to 0.36 of the side wide."""
    device = scene.shape.device
    backdrop = backdrop_palette(device)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(scene), device=device, generator=generator)

    return Paint(
        object=object_palette(device)[scene.colour],
        first=backdrop[scene.first],
        second=backdrop[scene.second],
        tilt=torch.zeros(len(scene), device=device),
        period=uniform(0.24, 0.36) * side,
        phase=uniform(0, 1),
    )


@dataclass(frozen=True)
class Window:
    """Part of a clip to draw: frames t0 + 0..T-1 as (B, T) indices, pixel centres xs (B, w) and ys (B, h)."""

    time: Tensor
    ys: Tensor
    xs: Tensor


def whole(count: int, *, frames: int, height: int, width: int, device: torch.device | str) -> Window:
    """The window that shows everything."""
    return Window(
        time=torch.arange(frames, device=device).expand(count, frames),
        ys=(torch.arange(height, device=device) + 0.5).expand(count, height),
        xs=(torch.arange(width, device=device) + 0.5).expand(count, width),
    )


@dataclass(frozen=True)
class Clips:
    """frames: (B, 3, T, H, W) in [-1, 1]; coverage: (B, T, H, W) share of each pixel that the object covers."""

    frames: Tensor
    coverage: Tensor


def _draw_backdrop(scene: Scene, paint: Paint, window: Window, *, height: int, width: int) -> Tensor:
    """(B, 3, h, w) in [0, 1]."""
    column, row = window.xs[:, None, :], window.ys[:, :, None]
    cos, sin = (f(paint.tilt)[:, None, None] for f in (torch.cos, torch.sin))
    ramp = (row / height - 0.5) * cos + (column / width - 0.5) * sin + 0.5
    kind = scene.backdrop[:, None, None]
    across = torch.where(
        kind == BACKDROPS.index("vertical stripes"), column * cos + row * sin, row * cos - column * sin
    )
    period = paint.period[:, None, None]
    wave = (((across / period + paint.phase[:, None, None]) % 1.0) - 0.5).abs() * 2
    stripes = ((wave - 0.5) * period / 2 + 0.5).clamp(0, 1)
    share = torch.where(kind == 0, 0.0, torch.where(kind == 1, ramp.clamp(0, 1), stripes))[:, None]
    return paint.first[..., None, None] * (1 - share) + paint.second[..., None, None] * share


def draw(scene: Scene, track: Track, paint: Paint, window: Window, *, height: int, width: int) -> Clips:
    """Draw a window of the clips; `height` and `width` are those of the whole frame."""
    x, y, radius, angle = (
        value.gather(1, window.time)[..., None, None] for value in (track.x, track.y, track.radius, track.angle)
    )
    dx = window.xs[:, None, None, :] - x
    dy = window.ys[:, None, :, None] - y
    cos, sin = torch.cos(angle), torch.sin(angle)
    distance = signed_distance(
        scene.shape.view(-1, 1, 1, 1), (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius
    )
    coverage = (0.5 - distance * radius).clamp(0, 1)
    backdrop = _draw_backdrop(scene, paint, window, height=height, width=width)[:, :, None]
    shade = coverage[:, None]
    frames = backdrop * (1 - shade) + paint.object[:, :, None, None, None] * shade
    return Clips(frames * 2 - 1, coverage)


@torch.no_grad()
def render(
    scene: Scene, generator: torch.Generator, *, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> Clips:
    """Draw whole clips on the scene's device; the generator must live there. Same generator state, same clips."""
    track = place(scene, generator, frames=frames, height=height, width=width)
    paint = mix_paint(scene, generator, side=min(height, width))
    window = whole(len(scene), frames=frames, height=height, width=width, device=scene.shape.device)
    return draw(scene, track, paint, window, height=height, width=width)
