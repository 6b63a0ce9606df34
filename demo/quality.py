"""What 8 bits cost in quality: clips of the held-out pairs with other weights and attention, against the exact ones.

    python -m demo.quality                                     # 100 pairs; fp8, int8, every lossy attention, and both
    python -m demo.quality --count 2 --steps 2 --variants fp8:torch_sdpa int8:torch_sdpa --json out.json

A variant is QUANT:ATTENTION. The exact clips are made in float32; on a GPU bfloat16 with exact attention is the first
variant, since what rounding alone changes is what the others are to be compared with. Prints a line a variant and,
last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.grammar import held_out_pairs, parse
from demo.judge import judge, score
from demo.shipped import BASE, T2V
from demo.stages.evaluate import PAIRS, Loaded, Recipe, load_folder, make_clips, plain_velocity
from lightx2v.bench.engine import BASELINE, LOSSY, NONE, backends
from lightx2v.bench.timing import machine, report
from lightx2v.config import QUANTS, Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.models.wan.config import HEAD_DIM
from lightx2v.schedules import wan

GUIDANCE, SHIFT = 4.0, 5.0


@dataclass(frozen=True)
class Variant:
    """How the transformer is run. dtype: of tokens. quant: of `Engine.quant`."""

    dtype: str
    quant: str = NONE
    attention: str = BASELINE

    @property
    def name(self) -> str:
        return f"{self.dtype if self.quant == NONE else self.quant}, {self.attention}"


EXACT = Variant("fp32")


def variants(asked: list[str], device: torch.device) -> list[Variant]:
    """Those asked for; without any, on what is exact in bfloat16 each lossy attention, 8-bit weights, and both.

    Raises ValueError for a word that is no QUANT:ATTENTION.
    """
    gpu = device.type == "cuda"
    dtype = "bf16" if gpu else "fp32"
    first = [Variant(dtype)] if gpu else []
    if asked:
        return first + [_parsed(word, dtype) for word in asked]
    lossy = backends([LOSSY], device, torch.bfloat16 if gpu else torch.float32, HEAD_DIM)
    packed = [Variant(dtype, quant, attention) for quant in ("fp8", "int8") for attention in (BASELINE, *lossy)]
    return [*first, *(Variant(dtype, attention=name) for name in lossy), *packed]


def _parsed(word: str, dtype: str) -> Variant:
    quant, _, attention = word.partition(":")
    if quant not in QUANTS or not attention:
        raise ValueError(f"--variants {word}: a variant is QUANT:ATTENTION, QUANT of {', '.join(QUANTS)}")
    return Variant(dtype, quant, attention)


def clips_of(variant: Variant, loaded: Loaded, pairs: list[tuple[str, int]], steps: int) -> Tensor:
    """Clips (B, 3, 17, 128, 128) in [-1, 1], on the CPU. Raises what loading raises where the variant cannot run."""
    device = next(loaded.vae.parameters()).device
    engine = Engine(attention=variant.attention, dtype=variant.dtype, quant=variant.quant)
    transformer = load_transformer(identify(T2V), engine, device)
    recipe = Recipe(wan(steps, SHIFT), cfg_scale=GUIDANCE)
    parts = (pairs[first : first + PAIRS] for first in range(0, len(pairs), PAIRS))
    return torch.cat([make_clips(loaded, plain_velocity(transformer), part, recipe).cpu() for part in parts])


def decibels(clips: Tensor, exact: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip, (B,); 100 where two are the same. Both in [-1, 1]."""
    return -10 * ((clips - exact) / 2).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def figures(clips: Tensor, exact: Tensor, pairs: list[tuple[str, int]]) -> dict[str, Any]:
    """What the judge says, and how near the clips are to the exact ones."""
    near = decibels(clips, exact)
    rates = score(judge(clips), [parse(prompt) for prompt, _ in pairs]).rates()
    spread = {"psnr_mean": near.mean(), "psnr_least": near.min(), "psnr_median": near.median()}
    return {**rates, **{name: round(float(value), 2) for name, value in spread.items()}}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a variant failed."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        "python -m demo.quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="held-out pairs, 1 to 400; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--variants", nargs="+", default=[], metavar="QUANT:ATTENTION")
    parser.add_argument("--seconds", type=float, default=300, help="after which no variant is begun")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    device, until = torch.device(args.device), time.monotonic() + args.seconds
    try:
        asked, pairs = variants(args.variants, device), held_out_pairs(args.count)
    except ValueError as error:
        parser.error(str(error))
    loaded = load_folder(BASE, device, torch.float32)
    exact = clips_of(EXACT, loaded, pairs, args.steps)
    rows: list[dict[str, Any]] = [{"name": EXACT.name, **figures(exact, exact, pairs)}]
    for variant in asked:
        row: dict[str, Any] = {"name": variant.name}
        start = time.monotonic()
        try:
            if start > until:
                raise TimeoutError("no time was left")
            row |= figures(clips_of(variant, loaded, pairs, args.steps), exact, pairs)
            row["seconds"] = round(time.monotonic() - start, 1)
        except Exception as error:  # a vendor's kernel may fail with anything, and the other variants still run
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        rows.append(row)
        print(json.dumps(row), flush=True)
    settings = {"count": args.count, "steps": args.steps, "cfg_scale": GUIDANCE}
    report({"benchmark": "demo.quality", **machine(device), **settings, "results": rows}, args.json)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
