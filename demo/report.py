"""The command line of the judge: make clips of the held-out pairs with a model folder and count what is right.

    python -m demo.judge                                  # 200 pairs through demo/models/wan2.1_t2v
    python -m demo.judge --count 20 --attention torch_sdpa --dtype bf16 --json
    python -m demo.judge --variant i2v --count 50         # or flf2v, moe, 4step; i2v starts from the picture asked for
    python -m demo.judge --prompt "a red cross moves left over a navy background" --seed 7

Prints a table and, last, one line of JSON. The exit status is 1 if --require is given and a rate is below its goal, 2
if a prompt cannot be judged.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demo.grammar import held_out_pairs, parse
from demo.judge import Scores, describe, judge, score
from demo.picture import draw_clip, save_picture
from demo.shipped import SHIPPED
from lightx2v.media import read_image

GOALS = {"colour": 0.95, "direction": 0.9, "shape": 0.85}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m demo.judge", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="model folder of the variant's family; default: the one that is shipped"
    )
    parser.add_argument("--variant", default="t2v", choices=[name for name in SHIPPED if name != "night"])
    parser.add_argument("--count", type=int, default=200, help="held-out pairs to make, 1 to 400")
    parser.add_argument("--prompt", help="judge this prompt instead of the held-out pairs")
    parser.add_argument("--seed", type=int, default=0, help="of --prompt")
    parser.add_argument("--steps", type=int, default=20, help="a distilled model keeps its own")
    parser.add_argument("--guidance", type=float, help="default: the model's own, 4 for text-to-video")
    parser.add_argument("--attention", default="auto", help="attention backend")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--require", action="store_true", help=f"fail below the goals {GOALS}")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Made:
    """A clip (1, 3, 17, 128, 128) in [-1, 1], and how near the frames that were given are to those, in dB."""

    clip: Tensor
    first_db: float | None = None
    last_db: float | None = None

    def nearness(self) -> str:
        """In words, where frames were given."""
        given = (("first", self.first_db), ("last", self.last_db))
        return "".join(f", {name} frame {value:.1f} dB" for name, value in given if value is not None)


def make_clips(args: argparse.Namespace, pairs: Sequence[tuple[str, int]]) -> Iterator[Made]:
    """One a pair, made by the engine."""
    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    options = {"attn_mode": args.attention, "dtype": args.dtype, "infer_steps": args.steps, **guidance}
    pipeline = SHIPPED[args.variant].pipeline(args.model, **options)
    with tempfile.TemporaryDirectory() as folder:
        for prompt, seed in pairs:
            given = _pictures(args.variant, prompt, seed, Path(folder))
            made = pipeline.generate(seed, prompt, return_result_tensor=True, progress=False, **given)["video"]
            assert made is not None
            near = [decibels(read_image(path)[0], made[at]) for path, at in zip(given.values(), (0, -1), strict=False)]
            yield Made(made.permute(3, 0, 1, 2)[None] * 2 - 1, *near)


def _pictures(variant: str, prompt: str, seed: int, folder: Path) -> dict[str, Path]:
    """The first frame of the clip that is asked for, and the last, as far as the variant takes them."""
    names = {"i2v": ("image_path",), "flf2v": ("image_path", "last_frame_path")}.get(variant, ())
    clip = draw_clip(prompt, seed) if names else ()
    return {name: save_picture(clip[at], folder / f"{name}.png") for name, at in zip(names, (0, -1), strict=False)}


def decibels(wanted: Tensor, frame: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1]."""
    return -10 * math.log10(max(float((wanted - frame).square().mean()), 1e-10))


def _table(scores: Scores, rates: dict[str, float]) -> str:
    lines = ["attribute   right of    rate  goal"]
    for name, rate in rates.items():
        total = int(scores.has_direction.sum()) if name == "direction" else len(scores.colour)
        goal = f"{GOALS[name]:.0%}" if name in GOALS else ""
        lines.append(f"{name:<11}{round(rate * total):>6} {total:>2}{rate:>8.1%}  {goal}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = _arguments(argv)
    try:
        pairs = [(args.prompt, args.seed)] if args.prompt else held_out_pairs(args.count)
        attributes = [parse(prompt) for prompt, _ in pairs]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    start, made = time.monotonic(), []
    for (prompt, seed), wanted, one in zip(pairs, attributes, make_clips(args, pairs), strict=True):
        made.append(one)
        if not args.json:
            found = judge(one.clip)
            mark = "ok" if bool(score(found, [wanted]).everything) else "--"
            print(f"{mark} {prompt!r} ({seed}): {describe(found, 0)}{one.nearness()}", flush=True)
    scores = score(judge(torch.cat([one.clip for one in made])), attributes)
    rates = scores.rates()
    if not args.json:
        print(_table(scores, rates))
    settings = {name: getattr(args, name) for name in ("variant", "steps", "guidance", "attention", "dtype")}
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in ("first_db", "last_db"):
        if found_db := [value for one in made if (value := getattr(one, name)) is not None]:
            mean, clear = sum(found_db) / len(found_db), sum(value > 30 for value in found_db) / len(found_db)
            rates |= {
                f"{name}_mean": round(mean, 2),
                f"{name}_least": round(min(found_db), 2),
                f"{name}_above_30": clear,
            }
    seconds = round((time.monotonic() - start) / len(pairs), 2)
    print(json.dumps({"count": len(pairs), **settings, **rates, "seconds_a_clip": seconds}))
    return int(args.require and any(rates[name] < goal for name, goal in GOALS.items()))
