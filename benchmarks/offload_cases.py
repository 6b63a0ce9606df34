"""What the benchmark of offload is made of: passes, caps on memory, and rows that say how a pass went."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.bench import packed
from lightx2v.bench.subjects import PROMPT_TOKENS, TEXT_TOKENS, Inputs, Subject
from lightx2v.bench.weights import build
from lightx2v.blocks import run_blocks
from lightx2v.checkpoint import Header
from lightx2v.identify import CheckpointInfo
from lightx2v.memory import FUSED, transformer_activation_bytes, waiting_bytes
from lightx2v.offload.plan import GB, Machine, Needs, Plan, Sizes, plan
from lightx2v.offload.stream import BlockStream
from lightx2v.paired import Both, Paired, in_turn
from lightx2v_kernels import Kernels

WRONG = "wrong: not what resident blocks give"
RIGHT = "passed"


@dataclass(frozen=True)
class Passes:
    """One network, and what it is run with."""

    network: nn.Module
    given: Inputs

    def resident(self) -> Tensor:
        return self.given.run(self.network)

    def streamed(self, stream: BlockStream, expert: str = "", following: str = "") -> Tensor:
        """following: the expert of the next pass."""
        given, walk = self.given, stream.around(run_blocks, following)
        out: Tensor = stream.bring(expert)(given.latents, given.timestep, given.context, run=walk, **given.more)
        return out


@dataclass(frozen=True)
class Steps:
    """Both passes of guidance by one network, which differ in the sign of their latents.

    paired: with one copy of each block for both; else one after the other.
    """

    network: nn.Module
    given: Inputs
    paired: bool = False

    def streamed(self, stream: BlockStream) -> Tensor:
        pair = Paired(run_blocks)
        walk = stream.around(pair, "")

        def velocity(latents: Tensor) -> Tensor:
            given = self.given
            out: Tensor = stream.bring()(latents, given.timestep, given.context, run=walk, **given.more)
            return out

        both: Both = pair.both if self.paired else in_turn
        return torch.cat(both(partial(velocity, self.given.latents), partial(velocity, -self.given.latents)))


@dataclass(frozen=True)
class Bench:
    """What all parts of a run share. until: clock, after which no part begins."""

    subject: Subject
    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    link: float | None
    until: float
    folder: Path
    caps: Sequence[float]
    ram_caps: Sequence[float]
    sizes: Sequence[str]  # of subjects.SIZES; "" as the subject is
    repeats: int
    attention: str = "auto"
    pin_gb: float = 4.0
    short: Sequence[int] = (5, 17, 33)  # frames

    def made(self, scheme: str = "", *, other: bool = False) -> nn.Module:
        """Random weights on the device. scheme: "" or one of packed.SCHEMES. other: those of a second expert."""
        network = build(self.subject, self.kernels, self.device, self.dtype, "plain")
        for name, parameter in network.named_parameters() if other else ():
            if name.endswith("modulation"):
                parameter.neg_()
        if scheme:
            packed.pack(self.subject, network, scheme, self.kernels)
        return network

    def activations(self, subject: Subject | None = None) -> int:
        """As the product plans them."""
        asked = subject or self.subject
        fused = all(self.kernels.names[op] == "triton" for op in FUSED)
        return transformer_activation_bytes(info_of(asked, self.dtype), latents_of(asked), self.dtype, fused=fused)

    def waiting(self, subject: Subject) -> int:
        """Of a pass while another one computes, as the product plans it."""
        rows = max(TEXT_TOKENS, PROMPT_TOKENS)
        return waiting_bytes(info_of(subject, self.dtype), latents_of(subject), rows, self.dtype)

    def plan(
        self,
        sizes: Sequence[Sizes],
        vram: float,
        *,
        least: bool = False,
        subject: Subject | None = None,
        waiting: int = 0,
    ) -> Plan:
        """Within so many bytes of the device. waiting: as `Needs` has it. Raises DoesNotFitError."""
        needs = Needs(tuple(sizes), self.activations(subject), waiting=waiting)
        return plan(needs, Machine(int(vram), 10**12, 10**12, self.link), least=least)


def info_of(subject: Subject, dtype: torch.dtype) -> CheckpointInfo:
    """A checkpoint of that network which is no file."""
    path = Path(subject.name)
    return CheckpointInfo(path, Header(path, {}, {}), subject.spec, subject.config, dtype)


def latents_of(subject: Subject) -> tuple[int, ...]:
    return (1, subject.spec.latents.channels, *subject.latents)


def place(name: str) -> torch.device:
    """The device of that name, a GPU with its number: some of PyTorch's calls take none without."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@contextmanager
def capped(device: torch.device, nbytes: float | None) -> Iterator[None]:
    """PyTorch may take so many bytes of a GPU, and has to say that memory ran out beyond them. None: all."""
    if not on_gpu(device) or nbytes is None:
        yield
        return
    release(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def release(device: torch.device) -> None:
    gc.collect()
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Marks:
    """Time of each of several calls in a row, without waiting in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if on_gpu(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def ms(self) -> list[float]:
        if on_gpu(self.device):
            torch.cuda.synchronize(self.device)
            return [round(first.elapsed_time(second), 2) for first, second in pairwise(self._marks)]
        return [round((second - first) * 1000, 3) for first, second in pairwise(self._marks)]


def measured(
    bench: Bench, work: Callable[[], Tensor], truth: Tensor | None, count: int | None = None
) -> dict[str, Any]:
    """One call that has to be right, then `count` in a row; no time where the first was wrong.

    Memory is counted beside what was there before, as PyTorch allocates and as it reserves.
    """
    device, marks = bench.device, Marks(bench.device)
    cuda = on_gpu(device)
    base = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    first = work()
    row: dict[str, Any] = {"first_s": round(now(device) - began, 3)}
    if truth is not None:
        row["gate"] = RIGHT if torch.equal(first.cpu(), truth.cpu()) else WRONG
    del first
    if row.get("gate") == WRONG:
        return row
    marks.mark()
    for _ in range(bench.repeats if count is None else count):
        work()
        marks.mark()
    row["ms_each"] = marks.ms()
    row["ms"] = median(row["ms_each"]) if row["ms_each"] else None
    if cuda:
        row["peak_gb"] = round((torch.cuda.max_memory_allocated(device) - base) / GB, 3)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved(device) / GB, 3)
    return row


def streamed(
    bench: Bench,
    passes: Passes | Steps,
    stream: BlockStream,
    made: Plan,
    cap: float | None,
    truth: Tensor | None,
    **more: Any,
) -> dict[str, Any]:
    """Passes as a plan places them, under a cap in bytes. more: as `measured` takes it."""
    cuda = on_gpu(bench.device)
    with capped(bench.device, cap):
        base = torch.cuda.memory_allocated(bench.device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        with stream.open(made.resident, made.prefetch):
            row = measured(bench, lambda: passes.streamed(stream), truth, **more)
            if cuda and "peak_gb" in row:
                row["peak_gb"] = round((torch.cuda.max_memory_allocated(bench.device) - base) / GB, 3)
    planned = {"plan": made.line(), "plan_gb": round(made.peak / GB, 3), "cap_gb": cap and round(cap / GB, 2)}
    if cuda and "reserved_gb" in row:
        row["reserved_over_plan"] = round(row["reserved_gb"] / planned["plan_gb"], 3)
    return {**planned, **row}


def beside(row: dict[str, Any], other: dict[str, Any]) -> None:
    """Write into a row how much longer it took than the other."""
    if row.get("ms") and other.get("ms"):
        row["over_resident"] = round(row["ms"] / other["ms"], 4)
