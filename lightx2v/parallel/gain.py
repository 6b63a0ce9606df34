"""Whether several devices are worth it: a few blocks on one against the same on all, and what that means for a step.

A pass is its blocks and what is beside them (embeddings, head, exchange of the result), which few blocks cannot tell
apart; so two depths are timed, and a line through both gives a whole pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v.blocks import Block, RunBlocks, run_blocks
from lightx2v.checkpoint import read_header
from lightx2v.config import Cache
from lightx2v.parallel.jobs import Job
from lightx2v_kernels.timings import Timings, facts_of, read, write

LEAST = 1.15  # times as fast as one
FEW, MORE = 2, 6  # blocks


@dataclass(frozen=True)
class Gain:
    """Seconds of one step, on one device and on all."""

    one: float
    all: float

    @property
    def times(self) -> float:
        """How many times as fast all are."""
        return self.one / self.all

    @property
    def worth(self) -> bool:
        return self.times >= LEAST

    def line(self, count: int) -> str:
        """What was measured, and what follows, in one line."""
        measured = f"{count} devices {self.all:.3g} s a step, one {self.one:.3g} s: {self.times:.2f} times as fast"
        if self.worth:
            return measured
        return f"{measured}, which is less than {LEAST}: one does it (use 'always' takes them in any case)"


def of_depths(few: tuple[float, float], more: tuple[float, float], depth: int) -> Gain:
    """few, more: seconds of a step of so many blocks, (one, all). depth: blocks that a network has."""
    if depth <= FEW:
        return Gain(*few)
    steps = (min(MORE, depth) - FEW, depth - FEW)
    one, every = (low + max(0.0, high - low) * steps[1] / steps[0] for low, high in zip(few, more, strict=True))
    return Gain(one, every)


def shallow(depth: int) -> RunBlocks:
    """Walks no more than so many blocks."""

    def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
        return run_blocks(blocks[:depth], tokens, args)

    return walk


def one_step(job: Job) -> Job:
    """The first step of a job alone, without what only later steps need."""
    sampling = replace(job.sampling, end_step=job.sampling.start_step + 1)
    return replace(job, sampling=sampling, cache=Cache(), previews=False)


def facts(job: Job, devices: Sequence[str]) -> Mapping[str, Any]:
    """What a measurement depends on."""
    on = [facts_of(torch.device(device)) if device != "cpu" else {"gpu": device} for device in devices]
    stamps = (each for path in job.transformers for each in sorted(read_header(path).stamps.items()))
    files = [[str(path), stamp.size, stamp.modified] for path, stamp in stamps]
    return {
        "parallel": on,
        "files": files,
        "engine": repr(job.engine),
        "loras": len(job.loras),
        "shape": list(job.shape),
        "text": list(job.cond.context.shape),
        "guided": job.sampling.guided,
    }


def remembered(known: Mapping[str, Any]) -> Gain | None:
    """What was measured under these facts, by whichever process. Of CPUs nothing is kept: their names are no facts."""
    timings = read(known) if _lasts(known) else None
    return None if timings is None else Gain(timings.ms["one"] / 1000, timings.ms["all"] / 1000)


def remember(known: Mapping[str, Any], gain: Gain) -> None:
    if _lasts(known):
        write(known, Timings({"one": gain.one * 1000, "all": gain.all * 1000}, {}))


def _lasts(known: Mapping[str, Any]) -> bool:
    return all(each["gpu"] != "cpu" for each in known["parallel"])
