"""What skipping steps costs: the small text-to-video model at 50 steps, without a cache and at several thresholds.

    python -m demo.tradeoff --count 40 --workers 8 --json benchmarks/results/cpu-cache-tradeoff.json

For every held-out pair the clip without a cache is the measure: PSNR of the clips with one, and what the judge reads in
each. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, report
from demo.grammar import held_out_pairs, parse
from demo.judge import Scores, judge, score
from demo.report import decibels
from demo.shipped import SHIPPED
from lightx2v import LightX2VPipeline

STEPS = 50
RATES = ("colour", "direction", "shape", "motion", "backdrop")


@dataclass(frozen=True)
class Setting:
    """A cache by LightX2V's name, and its threshold; or fewer steps without one."""

    cache: str
    threshold: float = 0.0
    steps: int = STEPS
    use_ret_steps: bool = False

    def arguments(self) -> dict[str, Any]:
        name = "teacache_thresh" if self.cache == "Tea" else "magcache_thresh"
        return {"cache_method": self.cache, name: self.threshold, "use_ret_steps": self.use_ret_steps}

    @property
    def label(self) -> str:
        if self.cache == "None":
            return f"{self.steps} steps"
        return f"{self.cache}Cache{', use_ret_steps' if self.use_ret_steps else ''}"


BASELINE = Setting("None")
SETTINGS = (
    *(Setting("Tea", threshold) for threshold in (0.03, 0.06, 0.1, 0.15, 0.2, 0.3)),
    *(Setting("Mag", threshold) for threshold in (0.03, 0.06, 0.12, 0.18, 0.24, 0.4)),
    *(Setting("None", steps=steps) for steps in (35, 25, 17)),
)


@dataclass(frozen=True)
class Made:
    """One clip of one setting: what it costs and what it shows."""

    setting: Setting
    skipped: float  # share of the forward passes
    psnr_db: float  # to the clip without a cache
    scores: Scores


def compare(pair: tuple[str, int], steps: int, settings: Sequence[Setting]) -> list[Made]:
    """One pair at every setting, the baseline first; on the CPU, one thread."""
    torch.set_num_threads(1)
    prompt, seed = pair
    pipe = SHIPPED["t2v"].pipeline(infer_steps=steps)
    exact = _clip(pipe, prompt, seed, BASELINE, steps)
    return [_made(pipe, pair, setting, exact, steps) for setting in (BASELINE, *settings)]


def _clip(pipe: LightX2VPipeline, prompt: str, seed: int, setting: Setting, steps: int) -> Tensor:
    """(T, H, W, 3) in [0, 1]"""
    pipe.enable_cache(**setting.arguments())
    count = round(setting.steps * steps / STEPS)
    made = pipe.generate(seed, prompt, infer_steps=count, return_result_tensor=True, progress=False)["video"]
    assert made is not None
    return made


def _made(pipe: LightX2VPipeline, pair: tuple[str, int], setting: Setting, exact: Tensor, steps: int) -> Made:
    clip = exact if setting == BASELINE else _clip(pipe, *pair, setting, steps)
    skipped = 1 - setting.steps / STEPS
    if setting.cache != "None":
        skipped = statistics.mean(each.saved for each in pipe.cache_reports)
    found = score(judge(clip.permute(3, 0, 1, 2)[None] * 2 - 1), [parse(pair[0])])
    return Made(setting, skipped, decibels(exact, clip), found)


def summed(made: Sequence[Made]) -> dict[str, Any]:
    """All clips of one setting in one row; rates are shares of the clips, direction of those asked to move."""
    setting = made[0].setting
    row = {"setting": setting.label, "threshold": setting.threshold, "skipped": made[0].skipped}
    row |= {"psnr_db": statistics.mean(one.psnr_db for one in made), "psnr_least_db": min(one.psnr_db for one in made)}
    for name in RATES:
        asked = [one for one in made if name != "direction" or bool(one.scores.has_direction)]
        row[name] = statistics.mean(float(getattr(one.scores, name)) for one in asked) if asked else None
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m demo.tradeoff", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="held-out pairs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result there too")
    args = parser.parse_args(argv)
    rows: dict[Setting, list[Made]] = {}
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        work = partial(compare, steps=args.steps, settings=SETTINGS)
        for made in pool.imap_unordered(work, held_out_pairs(args.count)):
            for one in made:
                rows.setdefault(one.setting, []).append(one)
            print(f"{len(rows[BASELINE])} of {args.count} pairs", flush=True)
    found = [summed(made) for made in rows.values()]
    for row in found:
        rates = ", ".join(f"{name} {row[name]:.1%}" for name in RATES if row[name] is not None)
        print(
            f"{row['setting']:<12} {row['threshold']:<5} saves {row['skipped']:.0%}, {row['psnr_db']:.1f} dB, {rates}"
        )
    facts = machine(torch.device("cpu"))
    report({"benchmark": "cache-tradeoff", **facts, "count": args.count, "steps": args.steps, "rows": found}, args.json)


if __name__ == "__main__":
    main()
