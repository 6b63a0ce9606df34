"""The convolutions of Wan2.1's decoder one by one, and what a decode spends its time in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.timing import median_ms
from lightx2v_kernels import registry
from lightx2v_kernels.closeness import why_too_far

Row = dict[str, Any]
Run = Callable[[], Tensor]

DOUBLED = (1, 3, 3)  # the kernel of the layers that double their frames first

# Channels in and out, kernel, divisor of the frame's sides, frames in one chunk of a latent frame, and how many layers
# of the decoder are like that. The last ones are of the encoder, of LightVAE and of the HunyuanVideo-1.5 VAE.
LAYERS = (
    (96, 96, (3, 3, 3), 1, 4, 6),
    (96, 3, (3, 3, 3), 1, 4, 1),
    (192, 96, DOUBLED, 1, 4, 1),
    (192, 192, (3, 3, 3), 2, 4, 6),
    (384, 192, DOUBLED, 2, 4, 1),
    (384, 384, (3, 3, 3), 4, 2, 5),
    (192, 384, (3, 3, 3), 4, 2, 1),
    (384, 192, DOUBLED, 4, 2, 1),
    (384, 384, (3, 3, 3), 8, 1, 10),
    (16, 384, (3, 3, 3), 8, 1, 1),
    (384, 768, (3, 1, 1), 4, 2, 1),
    (384, 768, (3, 1, 1), 8, 1, 1),
    (3, 96, (3, 3, 3), 1, 4, 0),
    (24, 24, (3, 3, 3), 1, 4, 0),
    (48, 48, (3, 3, 3), 1, 4, 0),
    (128, 128, (3, 3, 3), 1, 4, 0),
    (256, 256, (3, 3, 3), 2, 4, 0),
)

SIDE = 40  # pixels of the part of a frame that results are checked on


def measure(size: tuple[int, int, int], device: torch.device, left: Callable[[], float], *, tiles: bool) -> list[Row]:
    """Rows of every layer in every backend, and of the pass that makes its input ready. tiles: also in other tiles."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[Row] = []
    for channels, out, kernel, divisor, count, uses in LAYERS:
        if left() <= 0:
            break
        layer = Layer(channels, out, kernel, count, size[0] // divisor, size[1] // divisor)
        head: Row = {"layer": layer.label, "size": f"{count}x{layer.height}x{layer.width}", "layers": uses}
        if kernel == DOUBLED:
            args, backends, op = layer.to_double(device, dtype), capable("doubled_conv", device, dtype), "doubled_conv"
        else:
            given, preparations = layer.to_prepare(device, dtype), capable("conv_input", device, dtype)
            moved = 2 * given[0].numel() * given[0].element_size()
            for name, function, _ in preparations:
                row = timed(partial(function, *given), device, moved, "GB/s")
                rows.append({**head, "op": "conv_input", "backend": name, **row})
            args = (preparations[0][1](*given), *layer.to_convolve(device, dtype))
            backends, op = capable("conv3d", device, dtype), "conv3d"
            backends += _variants(layer, backends) if tiles else []
        for name, function, contract in backends:
            run = partial(function, *args)
            row = gated(run, contract, args) or timed(run, device, layer.flops, "TFLOP/s")
            rows.append({**head, "op": op, "backend": name, **row})
    return rows


@dataclass(frozen=True)
class Layer:
    """A convolution and the size of its result: frames, height, width."""

    channels: int
    out: int
    kernel: tuple[int, int, int]
    frames: int
    height: int
    width: int

    @property
    def label(self) -> str:
        return f"{self.channels}->{self.out} {'x'.join(map(str, self.kernel))}"

    @property
    def terms(self) -> int:
        """Of the sum that makes one number."""
        return self.channels * prod(self.kernel)

    @property
    def flops(self) -> float:
        return 2.0 * self.frames * self.height * self.width * self.out * self.terms

    def to_prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of conv_input."""
        x = some_frames(self.channels, self.frames, self.height, self.width, device, dtype)
        sides = (self.kernel[1] // 2, self.kernel[2] // 2)
        return x, torch.ones(self.channels, device=device, dtype=dtype), sides, False, 1

    def to_double(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of doubled_conv."""
        _, weight, bias, _ = self.to_convolve(device, dtype)
        return (
            some_frames(self.channels, self.frames, self.height // 2, self.width // 2, device, dtype),
            weight[:, :, 0],
            bias,
        )

    def to_convolve(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of conv3d after the first: past, weight, bias, residual."""
        lead, high, wide = (side - 1 for side in self.kernel)
        past = some_frames(self.channels, lead, self.height + high, self.width + wide, device, dtype) if lead else None
        weight = torch.randn(self.out, self.channels, *self.kernel, device=device) * self.terms**-0.5
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        bias = torch.randn(self.out, device=device, dtype=dtype)
        return past, weight, bias, some_frames(self.out, self.frames, self.height, self.width, device, dtype)


def capable(op: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Callable[..., Tensor], Any]]:
    """Name, function and contract of every backend but the reference that can run here, best rank first."""
    found = registry.registry(op)
    able = [b for b in found.ranked() if b.name != "reference" and b.why_not(device, dtype, 128) is None]
    return [(backend.name, backend.load(), found.op) for backend in able]


def _variants(layer: Layer, backends: list[Any]) -> list[Any]:
    """The Triton convolution in other tiles than its rule gives."""
    if not any(name == "triton" for name, *_ in backends):
        return []
    from lightx2v_kernels.conv3d._triton import Tiles, conv3d

    run, out, op = layer.kernel[2] * layer.channels, layer.out, backends[0][2]
    found = []
    for places, first, more, depth, stages, warps in (
        (128, 64, 32, 32, 5, 4), (128, 64, 32, 32, 5, 8), (128, 128, 0, 32, 5, 8), (256, 128, 0, 32, 4, 8),
        (256, 128, 0, 64, 3, 8), (128, 128, 0, 64, 4, 4), (128, 128, 0, 64, 3, 8), (256, 64, 32, 32, 3, 8),
        (128, 128, 64, 64, 3, 8), (128, 128, 64, 32, 5, 8), (64, 128, 64, 64, 4, 4), (64, 128, 64, 32, 4, 4),
        (128, 256, 0, 64, 3, 8), (64, 256, 0, 64, 3, 4), (256, 16, 0, 32, 4, 8),
    ):  # fmt: skip
        padded_out = -(-out // (first + more)) * (first + more)
        if -(-run // depth) * depth <= 1.4 * run and padded_out <= 1.4 * max(out, 16):
            how = Tiles(places, first, more, depth, stages, warps)
            name = f"triton {places}x{first}+{more}x{depth} s{stages} w{warps}"
            found.append((name, partial(conv3d, how=how), op))
    return found


def some_frames(c: int, t: int, h: int, w: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, t, h, w, c, device=device, dtype=dtype).permute(0, 4, 1, 2, 3)


def gated(run: Run, op: registry.Op, args: tuple[Any, ...]) -> Row | None:
    """A row without a time where the result is wrong or none comes; None where it is right.

    Held to what the upper left of the frames gives, which float32 need not wait long for.
    """
    corner = [a[..., :SIDE, :SIDE] if isinstance(a, Tensor) and a.ndim == 5 else a for a in args]
    if op.name == "conv3d":
        high, wide = (min(SIDE, side) - k + 1 for side, k in zip(args[0].shape[3:], args[2].shape[3:], strict=True))
        corner[4] = args[4][..., :high, :wide]
    wider = Tensor.double if args[0].dtype == torch.float32 else Tensor.float
    try:
        out = run()
    except Exception as error:  # a compiler may fail with anything; the others are still to be measured
        return {"ms": None, "rate": None, "note": f"{type(error).__name__}: {error}"[:80]}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth = op.reference(*(None if a is None else wider(a) for a in corner))
    inner = (..., slice(truth.shape[3] - 1), slice(truth.shape[4] - 1))  # doubled, a row and a column see beyond
    wrong = why_too_far(out[inner], truth[inner], op.reference(*corner)[inner])
    return {"ms": None, "rate": None, "note": f"wrong: {wrong}"} if wrong else None


def timed(run: Run, device: torch.device, work: float, unit: str) -> Row:
    try:
        ms = median_ms(run, device, budget_s=0.1, most=20)
    except torch.OutOfMemoryError:
        return {"ms": None, "rate": None, "note": "out of memory"}
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
    return {"ms": round(ms, 4), "rate": f"{work / ms * 1e3 / scale:.4g} {unit}"}


def profile(run: Callable[[], Any], device: torch.device, most: int = 25) -> list[Row]:
    """The kernels that one call spends most time in: ms and launches of each."""
    run()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as seen:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent = [(e.self_device_time_total or e.self_cpu_time_total, e.count, e.key) for e in seen.key_averages()]
    return [{"kernel": key[:90], "ms": round(us / 1000, 2), "launches": n} for us, n, key in sorted(spent)[::-1][:most]]


def table(rows: list[Row]) -> Table:
    """A column for each key that occurs."""
    titles = list(dict.fromkeys(key for row in rows for key in row))
    shown = Table(*titles)
    for row in rows:
        shown.add_row(*("-" if row.get(title) is None else str(row[title]) for title in titles))
    return shown
