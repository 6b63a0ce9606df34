"""Times the VAEs with random weights at their real widths: `python -m benchmarks.vae [--only wan,tae] [--json FILE]`.

Gate first: at a small size the result is compared with that of the same weights in float32, by the rule of the tests.
Then median ms of decode and encode, the peak of allocated memory, and every convolution of the Wan2.1 decoder by
itself, in each backend. diffusers and ComfyUI are timed too where they can be imported.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import frames, vae_peers
from benchmarks.text import measure as measure_text
from benchmarks.timing import machine, median_ms, report
from lightx2v.vae import hunyuan15, layers, tae
from lightx2v.vae.hunyuan15 import HunyuanVAE
from lightx2v.vae.loading import VAE
from lightx2v.vae.stream import arrange, decode, encode
from lightx2v.vae.tae import Remember, TAEConfig, TinyVAE
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from lightx2v.vae.wan22 import Wan22VAE
from lightx2v_kernels.closeness import why_too_far

SIZES = {"480p": (480, 832, 81), "720p": (720, 1280, 81), "small": (64, 96, 9)}  # height, width, frames
GATE = (64, 96, 9)


@dataclass(frozen=True)
class Model:
    """chunks: latent frames decoded at a time, each timed. Encoding takes four times as many frames at a time."""

    make: Callable[[], VAE]
    dtypes: tuple[torch.dtype, ...]
    chunks: tuple[int, ...]


Row = dict[str, Any]
BOTH = (torch.bfloat16, torch.float16)
MODELS = {
    "wan": Model(WanVAE, (torch.bfloat16,), (1, 2, 4)),
    "light": Model(lambda: WanVAE(WanVAEConfig(24)), (torch.bfloat16,), (1, 2, 4, 8)),
    "light48": Model(lambda: WanVAE(WanVAEConfig(48)), (torch.bfloat16,), (1, 4)),
    "tae": Model(lambda: TinyVAE(TAEConfig()), BOTH, (1, 3, 7, 21)),
    "wan22": Model(Wan22VAE, (torch.bfloat16,), (1, 2)),
    "hunyuan": Model(HunyuanVAE, (torch.float16,), (1, 2)),
}
OTHERS = ("layers", "peers", "umt5")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join([*MODELS, *OTHERS]), help=f"of {', '.join([*MODELS, *OTHERS])}")
    parser.add_argument("--size", choices=SIZES, default="480p" if cuda else "small")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=300, help="nothing new is begun after so long (default: 300)")
    parser.add_argument("--brief", action="store_true", help="decode on the device alone, in one type")
    parser.add_argument("--profile", action="store_true", help="also the kernels that one decode spends its time in")
    parser.add_argument("--tiles", action="store_true", help="also other tiles of the Triton convolution")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there too")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - {*MODELS, *OTHERS}:
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join([*MODELS, *OTHERS])}")
    return options


def build(model: Model, device: torch.device, dtype: torch.dtype) -> VAE:
    """Random weights, made in float32 from one seed and rounded, in the memory order of loaded ones."""
    with torch.device("meta"):
        vae = model.make()
    vae = vae.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise if name.endswith("bias") else noise * parameter[0].numel() ** -0.5)
        for module in vae.modules():
            if isinstance(module, Remember):
                module.conv[-1].weight.mul_(0.3)
    return arrange(vae.to(dtype)).eval().requires_grad_(False)


@contextmanager
def plain() -> Iterator[None]:
    """PyTorch's own layers in place of the fused kernels."""
    with ExitStack() as patches:
        for module in (layers, hunyuan15, tae):
            patches.enter_context(patch.object(module, "frame_kernels", _none))
        yield


def plainly(run: Callable[[], Any]) -> Any:
    with plain():
        return run()


def _none(x: Tensor, weight: Tensor) -> None:
    return None


def latents(vae: VAE, size: tuple[int, int, int], device: torch.device) -> Tensor:
    (height, width, count), (_, rows, columns) = size, vae.space.stride
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, vae.space.channels, (count - 1) // 4 + 1, height // rows, width // columns)
    return torch.randn(shape, generator=generator, device=device)


def pixels(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    height, width, count = size
    generator = torch.Generator(device).manual_seed(2)
    return (torch.rand(1, 3, count, height, width, generator=generator, device=device) * 2 - 1).to(dtype)


def gate(model: Model, vae: VAE, device: torch.device) -> str | None:
    """Why decode or encode is wrong, in words; None if both are right. Uneven chunks, so that the past is used."""
    raw, clip = latents(vae, GATE, device), pixels(GATE, device, next(vae.parameters()).dtype)

    def both(network: VAE) -> list[Tensor]:
        return [decode(network, raw, chunk=2, clamp=False), encode(network, clip.to(next(network.parameters())))]

    with plain(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth, baseline = both(build(model, device, torch.float32)), both(vae)
    for what, *values in zip(("decode", "encode"), both(vae), truth, baseline, strict=True):
        if reason := why_too_far(*values):
            return f"{what}: {reason}"
    return None


def timed(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Median ms, and on a GPU the peak GB beside what lay there before."""
    row: dict[str, Any] = {"ms": None, "peak_gb": None}
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            row["peak_gb"] = round((torch.cuda.max_memory_allocated(device) - before) / 1e9, 2)
        row["ms"] = round(median_ms(run, device, budget_s=1.5, most=9, least=2, warm=1), 2)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    return row


def calls(model: Model, vae: VAE, size: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed, by its name."""
    raw, clip = latents(vae, size, device), pixels(size, device, next(vae.parameters()).dtype)
    here = torch.empty(1, 3, size[2], *size[:2], device=device)
    there = torch.empty(here.shape)
    found: dict[str, Callable[[], Any]] = {}
    for chunk in model.chunks:
        found[f"decode, {chunk} at a time"] = partial(decode, vae, raw, chunk=chunk, out=here)
    for chunk in model.chunks:
        found[f"encode, {4 * chunk} frames at a time"] = partial(encode, vae, clip, chunk=4 * chunk)
    first = model.chunks[0]
    found[f"decode, {first} at a time, to main memory"] = partial(decode, vae, raw, chunk=first, out=there)
    if device.type == "cuda":
        run = found[f"decode, {first} at a time"]
        found[f"decode, {first} at a time, PyTorch's layers"] = lambda: plainly(run)
    return found


def measure(name: str, options: argparse.Namespace, device: torch.device, left: Callable[[], float]) -> list[Row]:
    """Rows of one VAE: for each dtype the gate, then every call. What is wrong, or left out, has a note and no time."""
    model, rows = MODELS[name], []
    dtypes = model.dtypes[:1] if options.brief else model.dtypes
    for dtype in dtypes if device.type == "cuda" else (torch.float32,):
        vae = build(model, device, dtype)
        wrong = gate(model, vae, device)
        head = {"model": name, "dtype": str(dtype)[6:], "gate": f"wrong: {wrong}" if wrong else "passed", "ms": None}
        todo = calls(model, vae, SIZES[options.size], device)
        if options.brief:
            todo = {what: run for what, run in todo.items() if what.startswith("decode") and what.endswith("time")}
        for what, run in todo.items():
            if wrong or left() <= 0:
                rows.append({**head, "what": what, "note": "wrong" if wrong else "left out: no time"})
            else:
                rows.append({**head, "what": what, **timed(run, device)})
        if options.profile and left() > 0:
            rows[-1]["profile"] = frames.profile(next(iter(todo.values())), device)
    return rows


def table(rows: list[Row]) -> Table:
    shown = Table("model", "type", "gate", "what")
    for title in ("ms", "peak GB", "note"):
        shown.add_column(title, justify="right")
    for row in rows:
        ms = "-" if row["ms"] is None else f"{row['ms']:.1f}"
        peak = "-" if row.get("peak_gb") is None else f"{row['peak_gb']:.2f}"
        shown.add_row(row["model"], row["dtype"], row["gate"], row["what"], ms, peak, row.get("note", ""))
    return shown


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, began = torch.device(options.device), time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: PyTorch {torch.__version__} sees no GPU; use --device cpu")
    console = Console(width=None if sys.stdout.isatty() else 150)
    document: dict[str, Any] = {"benchmark": "vae", **machine(device), "size": options.size, "results": []}

    def left() -> float:
        return options.seconds - (time.monotonic() - began)

    def keep() -> None:
        """After every part, so that a run that is cut off has left what it measured."""
        if options.json is not None:
            report(document, options.json, quiet=True)

    for name in (name for name in MODELS if name in options.only):
        document["results"] += (rows := measure(name, options, device, left))
        console.print(table(rows))
        for row in rows:
            if "profile" in row:
                console.print(f"{row['model']}: where one decode spends its time", frames.table(row["profile"]))
        keep()
    if "peers" in options.only:
        document["results"] += (rows := vae_peers.measure(SIZES[options.size], device, left))
        console.print(table(rows))
        keep()
    if "layers" in options.only:
        document["layers"] = frames.measure(SIZES[options.size], device, left, tiles=options.tiles)
        console.print(frames.table(document["layers"]))
        keep()
    if "umt5" in options.only:
        document["umt5"] = measure_text(device, left)
        console.print(frames.table(document["umt5"]))
    report(document, options.json)
    return int(any(row["gate"].startswith("wrong") for row in document["results"]))


if __name__ == "__main__":
    sys.exit(main())
