"""Times ways to cut the convolutions of LightVAE, of taew2_1 and of the full Wan VAE: `python -m benchmarks.conv`.

Each way is first held to the reference, at the same size, by the rule of the tests. Then ms of one call of several that
follow each other, and TFLOP/s of the products that count. What does not compile or is wrong has a note and no time.
On a GPU every kernel is compiled beforehand, several at a time, into Triton's cache.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.frames import Layer, capable, gated, some_frames, table, timed
from benchmarks.timing import machine, report
from lightx2v.unfinished import unfinished
from lightx2v_kernels import registry
from lightx2v_kernels.conv3d import _tiles
from lightx2v_kernels.conv3d._tiles import Tiles, shared_memory, tiles
from lightx2v_kernels.conv3d._triton import conv3d
from lightx2v_kernels.doubled_conv import _triton as doubling

WORTHWHILE = 0.03  # of the rule's time that other tiles must save
CALLS = 8  # of one timing: a single one is shorter than its launch
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A layer at the size at which a decode of 832x480 gives it to a kernel, and whose it is. relu: of its result."""

    whose: str
    layer: Layer
    relu: bool = False

    @property
    def doubled(self) -> bool:
        return self.layer.kernel == (1, 2, 2)

    @property
    def label(self) -> str:
        return f"{self.layer.label}{' relu' if self.relu else ''}"

    @property
    def size(self) -> str:
        return f"{self.layer.frames}x{self.layer.height}x{self.layer.width}"

    @property
    def key(self) -> str:
        """Of the layer in the kernels' table; the same at every size."""
        return _tiles.layer(self.layer.channels, self.layer.out, self.layer.kernel)

    def small(self) -> "Case":
        return replace(self, layer=replace(self.layer, frames=2, height=16, width=32))


CUBE, FLAT, PAIR, PHASES = (3, 3, 3), (1, 3, 3), (2, 3, 3), (1, 2, 2)
CASES = (
    Case("light", Layer(24, 24, CUBE, 4, 480, 832)),
    Case("light", Layer(48, 48, CUBE, 4, 240, 416)),
    Case("light", Layer(96, 96, CUBE, 4, 120, 208)),
    Case("light", Layer(24, 3, CUBE, 4, 480, 832)),
    Case("light", Layer(48, 24, PHASES, 16, 480, 832)),
    Case("light", Layer(24, 24, CUBE, 2, 480, 832)),
    Case("light", Layer(48, 48, CUBE, 2, 240, 416)),
    Case("tae", Layer(64, 64, FLAT, 6, 240, 416), relu=True),
    Case("tae", Layer(64, 64, PAIR, 6, 240, 416), relu=True),
    Case("tae", Layer(128, 128, FLAT, 3, 120, 208), relu=True),
    Case("tae", Layer(64, 64, PHASES, 12, 480, 832), relu=True),
    Case("tae", Layer(64, 3, FLAT, 12, 480, 832)),
    Case("full", Layer(96, 96, CUBE, 4, 480, 832)),
    Case("full", Layer(192, 192, CUBE, 4, 240, 416)),
    Case("full", Layer(384, 384, CUBE, 2, 120, 208)),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="light,tae,full", help="of light, tae, full (default: all)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=75, help="nothing new is begun after so long (default: 75)")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    parser.add_argument("--keep", action="store_true", help="write what was faster into the kernels' measured.json")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - {case.whose for case in CASES}:
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from light, tae, full")
    return options


def with_relu(run: Run, relu: bool) -> Run:
    return (lambda *args: run(*args).relu_()) if relu else run


def ways(case: Case, device: torch.device) -> dict[str, Run]:
    """Each takes what `arguments` gives."""
    if device.type == "cuda":
        return {**in_tiles(case), **in_cudnn(case)}
    half = torch.float32
    found = capable("doubled_conv" if case.doubled else "conv3d", device, half)
    return {name: with_relu(run, case.relu) for name, run, _ in found}


def tilings(case: Case) -> list[Tiles]:
    """Those worth a try: they compile without spilling on sm_90. The first is the rule's."""
    layer = case.layer
    rule = tiles(layer.channels, layer.out, layer.kernel, shared_memory(torch.device("cuda", 0)))
    if case.whose == "full":
        found = [replace(rule, lines=8), replace(rule, stages=1, lines=8)]
        if layer.out == 96:
            found += [Tiles(256, 64, 32, 32, 3, 8, 16, straight=True), Tiles(128, 64, 32, 32, 3, 4, 8, straight=True)]
        return [rule, *found]
    found = [replace(rule, lines=8), replace(rule, lines=8, stages=1)]
    if layer.out <= 64:
        found += [replace(rule, stages=1), replace(rule, places=256, warps=8, lines=16)]
        found += [replace(rule, places=256, warps=8, lines=16, stages=1)]
    channels = {3: (8, 0), 24: (16, 8), 48: (32, 16), 96: (64, 32)}.get(layer.out, (64, 0))
    shapes = [(128, 8, 4, 3), (128, 8, 4, 1), (256, 16, 8, 3)]
    if layer.out <= 48:
        shapes += [(256, 16, 4, 3), (256, 8, 4, 3), (256, 16, 4, 1)]
    return [rule, *found, *(Tiles(m, *channels, 32, at, w, lines, straight=True) for m, lines, w, at in shapes)]


def in_tiles(case: Case) -> dict[str, Run]:
    """By the name that `told` gives."""
    found: dict[str, Run] = {}
    for how in tilings(case):
        if case.doubled:
            found[told(how)] = partial(doubled, how=how, relu=case.relu)
        else:
            found[told(how)] = partial(conv3d, relu=case.relu, how=how)
    return found


def doubled(x: Tensor, weight: Tensor, bias: Tensor, *, how: Tiles, relu: bool) -> Tensor:
    with patch.object(doubling, "chosen", lambda *_: how):
        return doubling.doubled_conv(x, weight, bias, relu)


def told(how: Tiles) -> str:
    kind = "straight" if how.straight else "triton"
    channels = f"{how.channels}+{how.more_channels}"
    return f"{kind} {how.places}x{channels}x{how.depth} s{how.stages} w{how.warps} l{how.lines}"


def in_cudnn(case: Case) -> dict[str, Run]:
    """cuDNN's convolution of single frames with ReLU in its own store, over frames that are padded already."""
    if case.layer.kernel != FLAT or not case.relu:
        return {}

    def convolve(x: Tensor, past: None, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        from lightx2v.vae.layers import fold_time, unfold_time

        frames, batch = fold_time(x)
        beside, _ = fold_time(residual)
        kernel = weight[:, :, 0].contiguous(memory_format=torch.channels_last)
        sizes = ((1, 1), (0, 0), (1, 1), 1)
        return unfold_time(torch.cudnn_convolution_add_relu(frames, kernel, beside, 1.0, bias, *sizes), batch)

    return {"cudnn_convolution_add_relu": convolve}


def arguments(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    layer = case.layer
    if case.doubled:
        return replace(layer, kernel=FLAT).to_double(device, dtype)
    height, width = layer.height + layer.kernel[1] - 1, layer.width + layer.kernel[2] - 1
    x = some_frames(layer.channels, layer.frames, height, width, device, dtype)
    return x, *layer.to_convolve(device, dtype)


def compile_one(index: int, name: str) -> str | None:
    """Why a kernel does not compile; None if it does. Runs in a process of its own, on small frames."""
    device, case = torch.device("cuda", 0), CASES[index].small()
    try:
        with torch.inference_mode():
            ways(case, device)[name](*arguments(case, device, torch.bfloat16))
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler may fail with anything
        return f"{type(error).__name__}: {error}"[:200]
    return None


def compile_all(todo: list[tuple[int, str]], processes: int) -> dict[tuple[int, str], str]:
    """Notes on what does not compile."""
    names = [name for name in todo if name[1].startswith(("triton", "straight"))]
    if not names:
        return {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        try:
            notes = list(pool.map(compile_one, *zip(*names, strict=True)))
        except BrokenProcessPool as error:  # they are compiled as they are timed, then
            print(f"nothing is compiled beforehand: {error}", file=sys.stderr)
            return {}
    return {name: note for name, note in zip(names, notes, strict=True) if note}


def measure(case: Case, runs: dict[str, Run], device: torch.device, notes: dict[str, str]) -> Iterator[dict[str, Any]]:
    layer, half = case.layer, torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    args = arguments(case, device, half)
    contract = registry.registry("doubled_conv" if case.doubled else "conv3d").op
    if case.relu:
        contract = replace(contract, reference=with_relu(contract.reference, True))
    flops = layer.flops * (9 / 4 if case.doubled else 1)  # of the 3x3 kernel that it stands for: as others count
    for name, run in runs.items():
        head = {"vae": case.whose, "layer": case.label, "size": case.size}
        if name in notes:
            yield {**head, "way": name, "ms": None, "note": notes[name][:80]}
            continue
        row = gated(partial(run, *args), contract, args)
        if row is None:
            row = timed(partial(repeat, partial(run, *args)), device, CALLS * flops, "TFLOP/s")
            row["ms"] = row["ms"] and round(row["ms"] / CALLS, 4)
        yield {**head, "way": name, **row}
    del args


def winners(rows: list[dict[str, Any]], cases: list[Case]) -> dict[str, Tiles]:
    """layer -> the fastest tiles that save enough of the rule's time; of a layer timed at two sizes, at both."""
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        known = (case.label, case.size)
        ms = {row["way"]: row["ms"] for row in rows if (row["layer"], row["size"]) == known and row["ms"]}
        rule = told(tilings(case)[0])
        if rule not in ms:  # there was no time for it
            continue
        shares = {way: taken / ms[rule] for way, taken in ms.items() if way != rule}
        before = found.get(case.key, shares)
        found[case.key] = {way: max(share, before[way]) for way, share in shares.items() if way in before}
    best: dict[str, Tiles] = {}
    for case in cases:
        tilings_by_way = {told(how): how for how in tilings(case)}
        shares = {
            way: share
            for way, share in found.get(case.key, {}).items()
            if way in tilings_by_way and share < 1 - WORTHWHILE
        }
        if shares:
            best[case.key] = tilings_by_way[min(shares, key=lambda way: shares[way])]
    return best


def keep(rows: list[dict[str, Any]], cases: list[Case], gpu: str, file: Path) -> dict[str, Any]:
    """Write the winners beside those of other GPUs, and of other layers of this one; what was written."""
    held = json.loads(file.read_text())
    found = {name: asdict(how) for name, how in winners(rows, cases).items()}
    labels = {row["layer"] for row in rows}
    timed_here = {case.key for case in cases if case.label in labels}
    others = {name: how for name, how in held.get(gpu, {}).items() if name not in timed_here}
    held[gpu] = dict(sorted({**others, **found}.items()))
    with unfinished(file) as partial_file:
        partial_file.write_text(json.dumps(held, indent=1) + "\n")
    return found


def repeat(run: Callable[[], Tensor]) -> Tensor:
    for _ in range(CALLS - 1):
        run()
    return run()


@torch.inference_mode()
def main(arguments_: list[str] | None = None) -> int:
    options = parse(arguments_)
    device, began = torch.device(options.device), time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: PyTorch {torch.__version__} sees no GPU; use --device cpu")
    chosen = [case if device.type == "cuda" else case.small() for case in CASES]
    runs = {i: ways(case, device) for i, case in enumerate(chosen) if case.whose in options.only}
    document: dict[str, Any] = {"benchmark": "conv", **machine(device), "results": []}
    todo = [(i, name) for i in runs for name in runs[i]] if device.type == "cuda" else []
    notes = compile_all(todo, options.processes)
    document["compiled_s"] = round(time.monotonic() - began, 1)
    rows = document["results"]
    for index, names in runs.items():
        if time.monotonic() - began > options.seconds:
            break  # and nothing is said about the layers that are left
        rows += measure(chosen[index], names, device, {n: note for (i, n), note in notes.items() if i == index})
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.keep and device.type == "cuda":
            document["kept"] = keep(rows, [chosen[i] for i in runs], _tiles.place(device), _tiles.MEASURED)
        if options.json is not None:  # what a run that is cut off has measured
            report(document, options.json, quiet=True)
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    report(document, options.json)
    return int(any("wrong" in str(row.get("note", "")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
