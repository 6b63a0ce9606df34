"""Contestants on one subject: made, compared, timed in turns, profiled; what fails is kept with its reason."""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightx2v.bench.profile import profiled
from lightx2v.bench.timing import Times, time_calls
from lightx2v_kernels.closeness import relative_error

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contestant:
    """Ready to run. call() computes the result that is compared and timed. weight_bytes: of all that it reads."""

    call: Callable[[], Tensor]
    weight_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A contestant to be made.

    make: raises anything where it cannot be; the entry is then reported with that reason.
    lossy: its distance to the first entry is reported and not judged.
    extra_bytes: what it holds beside the weights that all share; entries of the same `holds` hold it once.
    """

    name: str
    make: Callable[[], Contestant]
    lossy: bool = False
    holds: str = ""
    extra_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """How a race is run.

    rounds: every contestant is called once a round. until: clock (time.monotonic) after which no further round or
        entry is begun. room: bytes that entries may hold at once beside the shared weights; None: no limit.
    """

    device: torch.device
    rounds: int = 5
    until: float = float("inf")
    room: float | None = None
    profile: bool = True
    say: Say = print

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until


def race(entries: Sequence[Entry], course: Course, flops: float, drop: Callable[[str], None]) -> Iterator[Row]:
    """A row for each entry, as soon as its heat has been run. The first entry is what others are compared with, and it
    runs in every heat, so that heats can be compared by it. Raises what it raises.

    drop(holds): gives back what entries of that name held.
    """
    first, *others = entries
    reference: Tensor | None = None
    for number, heat in enumerate(heats(others, course.room)):
        if course.over:
            yield from ({"name": e.name, "failed": "no time was left"} | dict(e.facts) for e in heat)
            continue
        ready: list[tuple[Contestant, Row]] = []
        for entry in (first, *heat):
            try:
                out, begun = _first_call(entry, course.device)
            except Exception as error:  # whatever a peer or a vendor's kernel raises, the others still run
                if reference is None:
                    raise
                yield {"name": entry.name, **entry.facts, "failed": _words(error)}
                course.say(f"{entry.name}: {_words(error)}")
                collect(course.device)
                continue
            reference = out if reference is None else reference
            row = begun[1]
            row["error"] = float(f"{relative_error(out, reference):.4g}")
            course.say(f"{entry.name}: first call {row['first_s']} s, relative error {row['error']:.2e}")
            ready.append(begun)
            del begun
        yield from _timed(ready, course, flops, again=first.name if number else None)
        ready.clear()
        for holds in {entry.holds for entry in heat} - {""}:
            drop(holds)
        collect(course.device)


def heats(entries: Sequence[Entry], room: float | None) -> list[list[Entry]]:
    """Entries in groups that fit into the room together, those that hold the same thing beside each other."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.holds or "", []).append(entry)
    found: list[list[Entry]] = [[]]
    left = room
    for group in groups.values():
        needed = max(entry.extra_bytes for entry in group)
        if left is not None and needed > left and found[-1]:
            found.append([])
            left = room
        found[-1] += group
        left = None if left is None else left - needed
    return found


def _first_call(entry: Entry, device: torch.device) -> tuple[Tensor, tuple[Contestant, Row]]:
    """The result of a first call, which also warms up, on the CPU; what it took in seconds and bytes."""
    gpu = device.type == "cuda"
    start = time.monotonic()
    made = entry.make()
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if gpu else 0
    out = made.call()
    row: Row = {"name": entry.name, **entry.facts, **made.facts}
    if not torch.isfinite(out).all():
        raise ValueError(f"{int((~torch.isfinite(out)).sum())} of {out.numel()} values are not finite")
    if gpu:
        # Others' weights lie on the device too: its own, and what the call needs beside them.
        row["peak_gib"] = round((made.weight_bytes + torch.cuda.max_memory_allocated(device) - before) / 2**30, 2)
    row |= {"weights_gib": round(made.weight_bytes / 2**30, 2), "first_s": round(time.monotonic() - start, 2)}
    return out.float().cpu(), (made, row)


def _timed(ready: Sequence[tuple[Contestant, Row]], course: Course, flops: float, again: str | None) -> Iterator[Row]:
    calls: list[list[float]] = [[] for _ in ready]
    for number in range(course.rounds):
        if course.over and number:
            break
        # Another one begins each round: what a call costs depends on how much power the one before it took.
        for place in range(len(ready)):
            (made, row), taken = ready[(place + number) % len(ready)], calls[(place + number) % len(ready)]
            if "failed" not in row:
                try:
                    taken += time_calls(made.call, course.device, 1)
                except Exception as error:
                    row["failed"] = _words(error)
    for (made, row), taken in zip(ready, calls, strict=True):
        if "failed" in row:
            yield row
            continue
        name = row["name"]
        row |= Times(tuple(taken)).row()
        row["tflops"] = round(flops / row["ms"] / 1e9, 3)
        if name == again:
            row["again"] = True  # the first entry, timed once more beside these
        elif course.profile and not course.over:
            row["profile"] = _profile(made, course.device)
        course.say(f"{name}: {row['ms']} ms ({row['ms_min']}-{row['ms_max']}), {row['tflops']} TFLOP/s")
        yield row


def _profile(made: Contestant, device: torch.device) -> Row:
    try:
        return profiled(made.call, device)
    except Exception as error:
        return {"failed": _words(error)}


def collect(device: torch.device) -> None:
    """Give back what nothing holds any more, compiled networks among it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]
