"""The command line of the judge: make clips of the held-out pairs with a model folder and count what is right.

    python -m demo.judge                                  # 200 pairs through demo/models/wan2.1_t2v
    python -m demo.judge --count 20 --attention torch_sdpa --dtype bf16 --json
    python -m demo.judge --prompt "a red cross moves left over a navy background" --seed 7

Prints a table and, last, one line of JSON. The exit status is 1 if --require is given and a rate is below its goal, 2
if a prompt cannot be judged.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from demo.grammar import held_out_pairs, parse
from demo.judge import Scores, describe, judge, score
from demo.world import FPS, FRAMES, HEIGHT, WIDTH

MODEL = Path(__file__).parent / "models" / "wan2.1_t2v"
GOALS = {"colour": 0.95, "direction": 0.9, "shape": 0.85}
GUIDANCE = 4.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m demo.judge", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder in Wan's layout")
    parser.add_argument("--count", type=int, default=200, help="held-out pairs to make, 1 to 400")
    parser.add_argument("--prompt", help="judge this prompt instead of the held-out pairs")
    parser.add_argument("--seed", type=int, default=0, help="of --prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--attention", default="auto", help="attention backend")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--require", action="store_true", help=f"fail below the goals {GOALS}")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    return parser.parse_args(argv)


def make_clips(args: argparse.Namespace, pairs: Sequence[tuple[str, int]]) -> Iterator[Tensor]:
    """Clips (1, 3, 17, 128, 128) in [-1, 1], one a pair, made by the engine."""
    from lightx2v import LightX2VPipeline

    pipeline = LightX2VPipeline(model_path=str(args.model), model_cls="wan2.1", task="t2v")
    pipeline.create_generator(
        attn_mode=args.attention,
        infer_steps=args.steps,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        guidance_scale=args.guidance,
        sample_shift=5.0,
        fps=FPS,
        dtype=args.dtype,
    )
    for prompt, seed in pairs:
        made = pipeline.generate(
            seed=seed, prompt=prompt, negative_prompt="", return_result_tensor=True, progress=False
        )
        yield made["video"].permute(3, 0, 1, 2)[None] * 2 - 1


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
    start, clips = time.monotonic(), []
    for (prompt, seed), wanted, clip in zip(pairs, attributes, make_clips(args, pairs), strict=True):
        clips.append(clip)
        if not args.json:
            found = judge(clip)
            mark = "ok" if bool(score(found, [wanted]).everything) else "--"
            print(f"{mark} {prompt!r} ({seed}): {describe(found, 0)}", flush=True)
    scores = score(judge(torch.cat(clips)), attributes)
    rates = scores.rates()
    if not args.json:
        print(_table(scores, rates))
    settings = {"steps": args.steps, "guidance": args.guidance, "attention": args.attention, "dtype": args.dtype}
    seconds = round((time.monotonic() - start) / len(pairs), 2)
    print(json.dumps({"count": len(pairs), **settings, **rates, "seconds_a_clip": seconds}))
    return int(args.require and any(rates[name] < goal for name, goal in GOALS.items()))
