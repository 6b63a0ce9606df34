"""How the convolutions are cut: by a rule, or as was the fastest where one was timed.

`measured.json` holds what `python -m benchmarks.conv --keep` found: compute capability -> layer -> tiles. A layer that
is not there, and every other GPU, goes by the rule.
"""

import functools
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton

MEASURED = Path(__file__).with_name("measured.json")
SIZES = ((128, 128, 64), (128, 128, 0), (256, 64, 32), (128, 128, 32))  # places and channels, for more than 64


@dataclass(frozen=True)
class Tiles:
    """places and channels: of one program's output; the channels in two products that share A, the second may be 0.
    depth: of one step along K. stages: steps in flight. warps: of 32 threads. lines: of the frame, that the places lie
    on as a rectangle; 1: one place after the other. straight: frames go from the cache straight into registers
    (`_gluon.py`: depth 32, lines more than 1), not through shared memory."""

    places: int
    channels: int
    more_channels: int
    depth: int
    stages: int
    warps: int
    lines: int = 1
    straight: bool = False


def cover(height: int, width: int, how: Tiles) -> int:
    """Programs for a frame."""
    if how.lines == 1:
        return triton.cdiv(height * width, how.places)
    return triton.cdiv(height, how.lines) * triton.cdiv(width, how.places // how.lines)


def tiles(channels: int, out_channels: int, kernel: tuple[int, int, int], memory: int) -> Tiles:
    """The rule. memory: bytes that the threads of one program may share."""
    size = (128, max(16, triton.next_power_of_2(out_channels)), 0)
    if out_channels > 64:
        size = min(SIZES, key=lambda size: -out_channels % sum(size[1:]))
    run = kernel[2] * channels

    def held(depth: int) -> int:
        """Steps that fit."""
        return min(4 if depth == 64 else 5, memory // (2 * sum(size) * depth))

    # A step costs its depth, filled or not, and about as much again as a depth of 8.
    depths = [depth for depth in (32, 64, 16) if held(depth) >= 3]
    depth = min(depths, key=lambda depth: -(-run // depth) * (depth + 8))
    return Tiles(*size, depth, held(depth), 4 if out_channels <= 64 else 8)


@functools.cache
def chosen(channels: int, out_channels: int, kernel: tuple[int, int, int], device: torch.device) -> Tiles:
    """The tiles for a layer on a device."""
    if device.type == "cuda":
        found = measured().get(place(device), {}).get(layer(channels, out_channels, kernel))
        if found is not None and (importlib.util.find_spec("triton.experimental") or not found.straight):
            return found
    return tiles(channels, out_channels, kernel, shared_memory(device))


def place(device: torch.device) -> str:
    """The key of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def layer(channels: int, out_channels: int, kernel: tuple[int, int, int]) -> str:
    """The key of a layer."""
    return f"{'x'.join(map(str, kernel))} {channels}->{out_channels}"


@functools.cache
def measured(file: Path = MEASURED) -> Mapping[str, Mapping[str, Tiles]]:
    """The table. Raises ValueError, which names the file and the layer, for tiles that are none."""
    held = json.loads(file.read_text(encoding="utf-8"))
    return {gpu: {name: _read(file, gpu, name, how) for name, how in layers.items()} for gpu, layers in held.items()}


def _read(file: Path, gpu: str, name: str, how: Mapping[str, object]) -> Tiles:
    names = [field.name for field in fields(Tiles)]
    straight = how.get("straight")
    sizes = [value for key, value in how.items() if key != "straight" and type(value) is int and value >= 0]
    if sorted(how) != sorted(names) or type(straight) is not bool or len(sizes) != len(names) - 1:
        raise ValueError(
            f"{file}: {gpu}, {name}: {dict(how)}: expected {', '.join(names)}, whole numbers and straight a bool; "
            "write the file with python -m benchmarks.conv --keep"
        )
    return Tiles(**how)  # type: ignore[arg-type]


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the threads of one program may share: 227 KiB on an H100, 99 KiB on consumer GPUs."""
    if device.type != "cuda":
        return 232448
    size: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return size
