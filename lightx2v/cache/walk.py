"""Walks that skip: on a skipped step the stored residual is added, and no block is run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightx2v.blocks import Block, Branch, RunBlocks, Walks
from lightx2v.cache import magcache, teacache
from lightx2v.cache.figures import Figures
from lightx2v.cache.turn import Turn
from lightx2v.config import Cache

log = logging.getLogger(__name__)
FEW_STEPS = 8  # and fewer: no two are alike enough, and step-distilled models were trained to take each


@dataclass(frozen=True)
class CacheReport:
    """What a cache decided for one network of one request.

    skipped: steps of each branch whose blocks are not run, counted over the full schedule from 0.
    passes: forward passes of the network in this request, of all branches.
    why_off: why nothing is skipped although a cache was asked for; empty where it works.
    """

    method: str
    expert: str
    total: int
    passes: int
    skipped: Mapping[Branch, tuple[int, ...]]
    why_off: str = ""

    @property
    def saved(self) -> float:
        """Share of the passes whose blocks are not run, 0..1."""
        return sum(map(len, self.skipped.values())) / self.passes if self.passes else 0.0

    def describe(self) -> str:
        """One line; steps counted from 1, as people do."""
        name = f"{self.method}, {self.expert}-noise expert" if self.expert else self.method
        if self.why_off:
            return f"{name}: off: {self.why_off}"
        if not self.saved:
            return f"{name}: skips no step of {self.total}"
        lists = {branch: _ranges([step + 1 for step in steps]) for branch, steps in self.skipped.items()}
        same = len(set(lists.values())) == 1
        told = next(iter(lists.values())) if same else "; ".join(f"{branch} {said}" for branch, said in lists.items())
        return f"{name}: skips steps {told} of {self.total}; {self.saved:.0%} of the passes saved"


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 8] -> "3-5, 8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


@dataclass(frozen=True)
class FeatureCache:
    """A `CacheFactory`: for each network of a request, walks that skip.

    figures: of the model, or of the high- and the low-noise expert.
    on_report: is told what will be skipped, before the network's first step.
    """

    settings: Cache
    figures: tuple[Figures, ...]
    on_report: Callable[[CacheReport], None] = lambda report: None

    def __call__(self, turn: Turn, run: RunBlocks) -> Walks:
        """Raises ValueError where the figures lack what the method reads."""
        if turn.total <= FEW_STEPS:
            why = f"{turn.total} steps; caches pay from {FEW_STEPS + 1} on"
            self._tell(turn, {branch: frozenset() for branch in turn.branches}, why)
            return lambda step, branch: run
        return _SkippingWalks(run, self._planner(turn))

    def _planner(self, turn: Turn) -> Callable[[], Mapping[Branch, frozenset[int]]]:
        figures, settings = self.figures[1 if turn.expert == "low" else 0], self.settings
        if settings.method == "teacache":
            polynomial = figures.polynomial(settings.use_ret_steps)
        else:
            tables = {branch: figures.ratios(branch == "uncond") for branch in turn.branches}
        if figures.steps and figures.steps != len(turn.steps):
            log.info("%s: measured at %d steps, used at %d", figures.name, figures.steps, len(turn.steps))

        def plan() -> Mapping[Branch, frozenset[int]]:
            if settings.method == "teacache":
                same = teacache.skipped_steps(
                    time_changes(turn, settings.use_ret_steps),
                    polynomial,
                    settings.limit(figures.usual),
                    first=turn.first,
                    use_ret_steps=settings.use_ret_steps,
                )
                found: dict[Branch, frozenset[int]] = {branch: same for branch in turn.branches}
            else:
                found = {
                    branch: magcache.skipped_steps(
                        magcache.nearest(table, len(turn.steps)),
                        settings.limit(figures.usual),
                        max_skips=settings.max_skips,
                        retention_ratio=settings.retention_ratio,
                        first=turn.first,
                    )
                    for branch, table in tables.items()
                }
            skipped = {branch: frozenset(turn.steps[step] for step in steps) for branch, steps in found.items()}
            self._tell(turn, skipped)
            return skipped

        return plan

    def _tell(self, turn: Turn, skipped: Mapping[Branch, frozenset[int]], why_off: str = "") -> None:
        ran = {branch: tuple(step for step in turn.ran if step in steps) for branch, steps in skipped.items()}
        passes = len(turn.ran) * len(turn.branches)
        report = CacheReport(self.settings.method, turn.expert, turn.total, passes, ran, why_off)
        log.info(report.describe())
        self.on_report(report)


@torch.inference_mode()
def time_changes(turn: Turn, projected: bool) -> list[float]:
    """Relative change of the time embedding over the steps of one network; brings the network to its device."""
    if turn.time_signal is None:
        raise ValueError("this model family has no TeaCache: nothing says how its timestep is embedded; use magcache")
    if len(turn.timesteps) < 2:
        return []
    timesteps = torch.tensor(turn.timesteps, dtype=torch.float32)
    return teacache.changes(turn.time_signal(turn.network(), timesteps, projected))


class _SkippingWalks:
    """The walks of one network in one request. A residual is kept only while the next step will add it."""

    def __init__(self, run: RunBlocks, plan: Callable[[], Mapping[Branch, frozenset[int]]]) -> None:
        self._run, self._plan = run, plan
        self._skipped: Mapping[Branch, frozenset[int]] | None = None
        self._residuals: dict[Branch, Tensor] = {}

    def __call__(self, step: int, branch: Branch) -> RunBlocks:
        if self._skipped is None:  # not before the network's turn: of two experts one is on the device
            self._skipped = self._plan()
        skipped, residuals = self._skipped[branch], self._residuals

        def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
            if step in skipped:
                out = tokens + residuals[branch]
            else:
                residuals.pop(branch, None)
                out = self._run(blocks, tokens, args)
                if step + 1 in skipped:
                    residuals[branch] = out - tokens
            if step + 1 not in skipped:
                residuals.pop(branch, None)
            return out

        return walk
