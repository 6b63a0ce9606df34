"""Median times, and the words for the machine they were taken on."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def median_ms(
    fn: Callable[[], Any],
    device: torch.device,
    budget_s: float = 0.5,
    most: int = 200,
    *,
    least: int = 5,
    warm: int = 3,
) -> float:
    """Median time of one call in ms, over as many calls as fit in the budget (`least` at least), after `warm` others.

    On a GPU by events around each call, so launch overhead that the device hides is not counted. Inputs stay where they
    are: one larger than the cache is read from memory, a smaller one from the cache, where a model has just put it.
    """
    once = _time(fn, device, calls=warm)[-1]
    calls = max(least, min(most, int(budget_s * 1000 / max(once, 1e-3))))
    return statistics.median(_time(fn, device, calls))


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, versions and the date (UTC): what a time means nothing without."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "sm": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


def report(document: dict[str, Any], file: Path | None, *, quiet: bool = False) -> None:
    """Print the document as the last line of stdout, unless quiet; with a file, keep it there, whole or not at all."""
    if file is not None:
        unfinished = file.with_name(file.name + ".part")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.replace(file)
    if not quiet:
        print(json.dumps(document, separators=(",", ":")), flush=True)


def _time(fn: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    if device.type == "cuda":
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in marks:
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in marks]
    times = []
    for _ in range(calls):
        start_s = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start_s) * 1000)
    return times


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
