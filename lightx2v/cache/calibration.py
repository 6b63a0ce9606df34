"""Measuring a checkpoint: everything is computed, and what a cache would have relied on is written down."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightx2v.blocks import Block, Branch, RunBlocks, Walks
from lightx2v.cache import magcache, teacache
from lightx2v.cache.figures import Figures
from lightx2v.cache.turn import Turn
from lightx2v.cache.walk import time_changes

FEWEST = 7  # steps: 6 changes, the fewest that a polynomial of degree 4 can be fitted to rather than drawn through
# Different in motion, subject and light; for models that were trained on anything.
PROMPTS = (
    "A sailing boat crosses a rough sea under dark clouds, waves breaking over its bow.",
    "Close-up of an old watchmaker at his bench, lamplight, his hands turn a tiny screw.",
    "A red fox runs through a snowy forest towards the camera and stops.",
    "A slow flight over a city at dusk, windows lighting up, cars moving along the avenues.",
)


@dataclass
class _Seen:
    """Of one network: its turn, and for each branch and step one value a request."""

    turn: Turn
    ratios: dict[tuple[Branch, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[tuple[Branch, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    embeddings: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # changes: plain, projected


class Recorder:
    """A `CacheFactory` that skips nothing. Pass it to `diffuse` for several whole requests, then ask for `figures`.

    Per branch two token tensors (B, L, D) are kept from step to step.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    @property
    def requests(self) -> int:
        """Whole requests measured so far."""
        return min((len(values) for seen in self._seen.values() for values in seen.ratios.values()), default=0)

    def __call__(self, turn: Turn, run: RunBlocks) -> Walks:
        """Raises ValueError for a network with too few steps, and for a part of a schedule."""
        if len(turn.ran) < FEWEST or turn.ran != turn.steps:
            raise ValueError(
                f"a calibration needs {FEWEST} steps or more of each network, from the first to the last; this one "
                f"runs {len(turn.ran)} of {len(turn.steps)}: use 20 steps or more, with two experts 40"
            )
        seen = self._seen.setdefault(turn.expert, _Seen(turn))
        if seen.turn.timesteps != turn.timesteps:
            raise ValueError("calibrate with one schedule: steps, shift and scheduler must stay the same")
        return _recording(turn, run, seen)

    def figures(self, shift: float, expert: str = "") -> Figures:
        """What was measured of one network, expert "high", "low" or "". Raises ValueError before a request ran."""
        if not self.requests:
            raise ValueError("nothing was measured yet: run a request with this as its cache")
        seen = self._seen[expert]
        steps = seen.turn.steps
        output = [_mean(seen.outputs["cond", step] + seen.outputs["uncond", step]) for step in steps[1:]]
        plain, projected = (teacache.fit(list(zip(changes, output, strict=True))) for changes in seen.embeddings)
        ranges = [(min(changes), max(changes)) for changes in seen.embeddings]
        ratios: dict[Branch, tuple[float, ...]] = {
            branch: (1.0, *(round(_mean(seen.ratios[branch, step]), 5) for step in steps[1:]))
            for branch in seen.turn.branches
        }
        return Figures(
            "just measured",
            tea=plain,
            tea_projected=projected,
            mag=ratios["cond"],
            mag_uncond=ratios.get("uncond", ()),
            steps=len(steps),
            shift=shift,
            tea_range=ranges[0],
            tea_projected_range=ranges[1],
        )


def _recording(turn: Turn, run: RunBlocks, seen: _Seen) -> Walks:
    last: dict[Branch, tuple[Tensor, Tensor]] = {}

    def walks(step: int, branch: Branch) -> RunBlocks:
        if not seen.embeddings[0]:
            for changes, projected in zip(seen.embeddings, (False, True), strict=True):
                changes.extend(time_changes(turn, projected))

        def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
            out = run(blocks, tokens, args)
            residual = out - tokens
            if branch in last:
                before, earlier = last[branch]
                seen.outputs[branch, step].append(_relative_change(before, out))
                seen.ratios[branch, step].append(magcache.magnitude_ratio(residual, earlier))
            last[branch] = out, residual
            return out

        return walk

    return walks


def _relative_change(before: Tensor, after: Tensor) -> float:
    return ((after - before).abs().mean(dtype=torch.float32) / before.abs().mean(dtype=torch.float32)).item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
