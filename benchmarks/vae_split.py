"""Times decoding by several processes: `torchrun --nproc_per_node 2 -m benchmarks.vae_split [--json FILE]`.

Random weights at the published widths, in the type that each VAE is used in. Gate first: at a small size of an odd
number of rows the frames and latents of all together are held to those of one process, by the rule of the tests. Then
median ms of decode on rank 0 alone while the others wait, and of all together, in turns; the least and the most of
each, the ratio of the medians, and rank 0's peak of allocated memory. On a CPU: a small size, to see that it runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.timing import machine
from benchmarks.vae import MODELS, SIZES, build, latents, pixels
from lightx2v.config import Parallel
from lightx2v.parallel.agreement import meet
from lightx2v.parallel.frames import SplitVAE
from lightx2v.parallel.frames import decode as decode_together
from lightx2v.parallel.mesh import Mesh, join, launched, own_device
from lightx2v.vae.loading import VAE
from lightx2v.vae.stream import decode, encode
from lightx2v_kernels.closeness import relative_error, why_too_far

SPLIT = ("wan", "wan22", "hunyuan")
GATE = (112, 96, 9)  # 14 or 7 rows of latents


def gate(mesh: Mesh, name: str, vae: VAE) -> str | None:
    """Why all together are wrong, in words, on rank 0; None if they are right. Every process must call it."""
    dtype = next(vae.parameters()).dtype
    raw, clip = latents(vae, GATE, mesh.device), pixels(GATE, mesh.device, dtype)
    split = SplitVAE(vae, mesh.whole)
    together = decode_together(split, raw, clamp=False), encode(split, clip)
    if not mesh.first:
        return None
    alone = decode(vae, raw, clamp=False), encode(vae, clip)
    wide = build(MODELS[name], mesh.device, torch.float32)
    truth = decode(wide, raw, clamp=False), encode(wide, clip.float())
    for what, made, one, exact in zip(("decode", "encode"), together, alone, truth, strict=True):
        assert made is not None  # this is rank 0
        if dtype == torch.float32 and relative_error(made, one) > 1e-5:
            return f"{what}: {relative_error(made, one):.1e} from one process"
        if dtype != torch.float32 and (reason := why_too_far(made, exact, one)):
            return f"{what}: {reason}"
    return None


def measure(mesh: Mesh, name: str, size: str = "480p", repeats: int = 5) -> dict[str, Any]:
    """One row, alike on all processes but for `peak_gb`, which is this one's own. Every process must call it.

    name: of `SPLIT`. Raises ArithmeticError on rank 0 where the gate fails; the others then wait in vain, and torchrun
    ends them.
    """
    dtype = MODELS[name].dtypes[0] if mesh.device.type == "cuda" else torch.float32
    vae = build(MODELS[name], mesh.device, dtype)
    if reason := gate(mesh, name, vae):
        raise ArithmeticError(f"{name} on {mesh.size} processes: {reason}")
    split, raw = SplitVAE(vae, mesh.whole), latents(vae, SIZES[size], mesh.device)
    out = torch.empty(1, 3, *SIZES[size][2:], *SIZES[size][:2]) if mesh.first else None  # in main memory, as in use
    ways: dict[str, Callable[[], Any]] = {
        "one": lambda: decode(vae, raw, out=out) if mesh.first else None,
        "together": lambda: decode_together(split, raw, out=out),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for turn in range(repeats + 1):  # the first is not counted
        for way, run in ways.items():
            seconds, peaks[way] = _timed(mesh, run)
            times[way] += [seconds * 1000] if turn else []
    medians = {way: statistics.median(each) for way, each in times.items()}
    return {
        "vae": name,
        "size": size,
        "processes": mesh.size,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{way}_ms": [round(f(each), 1) for f in (min, statistics.median, max)] for way, each in times.items()},
        "ratio": round(medians["one"] / medians["together"], 2),
        "peak_gb": {way: round(peak, 2) for way, peak in peaks.items()},
    }


def _timed(mesh: Mesh, run: Callable[[], Tensor | None]) -> tuple[float, float]:
    """Seconds until all are done, and this process's peak of allocated GB."""
    cuda = mesh.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(mesh.device)
        torch.cuda.synchronize(mesh.device)
    meet(mesh)
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(mesh.device)
    meet(mesh)
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.broadcast(took, 0, group=mesh.control)
    return took.item(), torch.cuda.max_memory_allocated(mesh.device) / 1e9 if cuda else 0.0


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="torchrun --nproc_per_node N -m benchmarks.vae_split")
    parser.add_argument("--only", nargs="+", choices=SPLIT, default=SPLIT)
    parser.add_argument("--size", choices=SIZES, default="480p" if cuda else "small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results of rank 0 there too")
    options = parser.parse_args(arguments)
    launch = launched()
    if launch is None:
        parser.error("nothing started several processes: use torchrun --nproc_per_node 2")
    device = own_device()
    mesh = join(Parallel(ulysses=launch.size), device)
    rows = []
    for name in options.only:
        rows.append(measure(mesh, name, options.size, options.repeats))
        if mesh.first:
            print(json.dumps(rows[-1]), flush=True)
    if mesh.first and options.json is not None:
        told = json.dumps({"machine": machine(device), "rows": rows}, indent=1)
        partial = options.json.with_name(f".{options.json.name}.partial")
        partial.write_text(told, encoding="utf-8")
        partial.replace(options.json)


if __name__ == "__main__":
    main()
