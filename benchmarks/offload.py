"""What it costs to run a model that does not fit: `python -m benchmarks.offload --json FILE [--seconds 460]`.

A network of real size and random weights, Wan2.1 14B at 480x832x81 unless told otherwise. Its parts, in the order of
their worth; the file is whole after each, one that fails says so in it, and none begins that has no time left:

    bf16        all blocks on the GPU; then all of them pass through it, PyTorch held to the smallest cap
    diffusers   its group offload of the same weights, if it is installed
    fp8         as bf16
    caps        fp8 at 480p and 720p, as *auto* plans it within each cap of GPU memory
    pair        two experts in fp8, as Wan2.2 A14B has: how long a pass takes that comes after a switch
    ram         fp8 from a file on the disk, held to each cap of RAM; memory is the process's own, anonymous and pinned
    pinning     seconds a GB to touch and to pin memory
    pair-bf16   two experts in bf16, 57 GB of RAM
    guidance    steps of both passes of guidance for short videos, whose copies computing does not hide: each block
                copied for each pass, and once for both

Gate first: a pass gives, bit for bit, what resident blocks give, or no time is reported. `--tiny` runs all of it in
seconds on any machine.
"""

import argparse
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import offload_parts as parts
from benchmarks.offload_cases import Bench, place, release
from lightx2v.bench.subjects import CONFIGS, subject
from lightx2v.bench.timing import keep, machine, report
from lightx2v.offload.lane import link_rate
from lightx2v.offload.plan import GB
from lightx2v_kernels import select

LEFT_OUT = "left out: it takes about {need} s, {left:.0f} are left"


@dataclass(frozen=True)
class Part:
    """seconds: about what it takes on an H100; it does not begin with less. after: needs what this one leaves."""

    run: Callable[[Bench, parts.Shelf, dict[str, Any]], None]
    seconds: int


PARTS = {
    "bf16": Part(parts.weights, 60),
    "diffusers": Part(parts.peer, 70),
    "fp8": Part(parts.fp8, 35),
    "caps": Part(parts.caps, 40),
    "pair": Part(parts.pair, 40),
    "pair-bf16": Part(parts.pair_bf16, 60),
    "guidance": Part(parts.guidance, 30),
    "pinning": Part(parts.pinning, 10),
    "ram": Part(parts.ram, 50),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="wan2.1-14b")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--attention", default="exact", help="exact, auto, or the name of a backend; default: exact")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="default: all parts")
    parser.add_argument("--caps", nargs="*", type=float, default=[8, 12, 16, 24], help="GB of GPU memory")
    parser.add_argument("--ram-caps", nargs="*", type=float, default=[16, 32], help="GB of RAM")
    parser.add_argument("--seconds", type=float, default=460, help="for all parts together")
    parser.add_argument("--folder", type=Path, help="where a file of the model's size goes; default: the system's")
    parser.add_argument("--tiny", action="store_true", help="toy size, to try everything out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there, after each part")
    return parser.parse_args(arguments)


def bench_of(options: argparse.Namespace, folder: Path, until: float) -> Bench:
    device, wanted = place(options.device), subject(options.model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = select(attention=options.attention, device=device, dtype=dtype, head_dim=wanted.spec.head_dim)
    return Bench(
        subject=wanted.toy() if options.tiny else wanted,
        device=device,
        dtype=dtype,
        kernels=kernels,
        link=link_rate(device),
        until=until,
        folder=folder,
        # at toy size next to nothing is added to what a plan keeps in reserve
        caps=[0.61 + cap / 1000 for cap in options.caps] if options.tiny else options.caps,
        ram_caps=[cap / 1000 for cap in options.ram_caps] if options.tiny else options.ram_caps,
        sizes=("",) if options.tiny else ("480p", "720p"),
        repeats=3,
        attention=options.attention,
        pin_gb=0.01 if options.tiny else 4.0,
        short=(5,) if options.tiny else (5, 17, 33),
    )


def run_part(name: str, bench: Bench, shelf: parts.Shelf) -> dict[str, Any]:
    """Its figures; with what it failed with, if it did."""
    began, found = time.perf_counter(), dict[str, Any]()
    left = bench.until - began
    if left < (0 if bench.pin_gb < 1 else PARTS[name].seconds):
        return {"failed": LEFT_OUT.format(need=PARTS[name].seconds, left=max(0.0, left))}
    try:
        PARTS[name].run(bench, shelf, found)
    except Exception as error:  # whatever one part fails with, the others go on
        traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    release(bench.device)
    return {**found, "took_s": round(time.perf_counter() - began, 1)}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench, shelf = bench_of(options, Path(folder), began + options.seconds), parts.Shelf()
        document: dict[str, Any] = {"benchmark": "offload", **machine(bench.device), "model": bench.subject.name}
        document |= {"tokens": bench.subject.tokens, "kernels": dict(bench.kernels.names)}
        document |= {"link_gb_s": round(bench.link / GB, 2) if bench.link else None, "parts": {}}
        for name in [name for name in PARTS if name in options.only]:
            document["parts"][name] = run_part(name, bench, shelf)
            document["seconds"] = round(time.perf_counter() - began, 1)
            if options.json is not None:
                keep(document, options.json)
            Console(width=None if sys.stdout.isatty() else 140).print({name: document["parts"][name]})
    report(document, options.json)
    return int(any(parts.WRONG in str(part) for part in document["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
