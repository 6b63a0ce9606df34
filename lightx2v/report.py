"""What ran: stages with their times and memory, and what each says of itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from lightx2v.cache.walk import CacheReport
from lightx2v.config import Engine
from lightx2v.heap import trim_heap
from lightx2v.identify import CheckpointInfo
from lightx2v.loading import choose_kernels, compute_dtype
from lightx2v.lora import Applied
from lightx2v.offload.plan import Plan


@dataclass(frozen=True)
class Stage:
    """One stage that ran: wall-clock seconds, and bytes of device memory at most, None where nothing counts them."""

    name: str
    seconds: float
    peak: int | None = None
    lines: tuple[str, ...] = ()

    def line(self) -> str:
        return f"{self.name} {self.seconds:.1f} s" + (f" (peak {self.peak / 1e9:.1f} GB)" if self.peak else "")


@dataclass(frozen=True)
class Report:
    """The stages of one video, in the order in which they ran."""

    stages: tuple[Stage, ...] = ()

    def then(self, *stages: Stage) -> "Report":
        return replace(self, stages=(*self.stages, *stages))

    def text(self) -> str:
        """One fact a line: what stages say, then how long each took and, where that is known, how much memory."""
        said = [line for stage in self.stages for line in stage.lines]
        times = ", ".join(stage.line() for stage in self.stages)
        most = ram_peak()
        return "\n".join([*said, f"stages: {times}", *([f"RAM: {most / 1e9:.1f} GB at most so far"] if most else [])])


class Watch:
    """Notes the stages of one video on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stages: list[Stage] = []

    @property
    def seconds(self) -> dict[str, float]:
        return {stage.name: stage.seconds for stage in self.stages}

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """What runs within is a stage; the list takes the lines that it says of itself.

        At its end the main memory that it freed is given back, within its time.
        """
        cuda, lines = self._device.type == "cuda", list[str]()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        began = perf_counter()
        yield lines
        if cuda:
            torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else None
        trim_heap()
        self.stages.append(Stage(name, perf_counter() - began, peak, tuple(lines)))


def sampling_lines(
    infos: Sequence[CheckpointInfo],
    engine: Engine,
    device: torch.device,
    plan: Plan | None,
    applied: Sequence[Applied | None],
    caches: Sequence[CacheReport],
) -> list[str]:
    """What ran the transformers: files, kernels, types, memory, LoRAs, caches."""
    kernels = choose_kernels(infos[0], engine, device)
    dtype = str(compute_dtype(engine, infos[0].dtype, device)).removeprefix("torch.")
    lines = [f"model: {info.path.name}: {info.describe()}" for info in infos]
    lines.append(f"kernels: {_by_backend(kernels.names)}; computing in {dtype} on {_named(device)}")
    lines.append(plan.line() if plan is not None else f"offload: {engine.offload}, whole transformers")
    lines += [f"parallel: {engine.parallel.describe()}"] if engine.parallel.size > 1 else []
    lines += [f"LoRA: {line}" for each in applied if each is not None for line in each.lines()]
    return lines + [f"cache: {report.describe()}" for report in caches]


def _by_backend(names: Mapping[str, str]) -> str:
    """{"attention": "a", "rope": "b", "modulate": "b"} -> "attention a; rope, modulate b"."""
    ops: dict[str, list[str]] = {}
    for op, backend in names.items():
        ops.setdefault(backend, []).append(op)
    return "; ".join(f"{', '.join(members)} {backend}" for backend, members in ops.items())


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def ram_peak() -> int | None:
    """Bytes of RAM that this process had at most, mapped files included; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = (line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"]), None)
