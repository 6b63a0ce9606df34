"""Times on a device, and the words for the machine they were taken on."""

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightx2v.unfinished import unfinished

PACKAGES = ("triton", "diffusers", "transformers", "fa3-fwd", "flash-attn", "sageattention", "sgl-kernel", "torchao")
NVIDIA_SMI = ("driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "temperature.gpu")


@dataclass(frozen=True)
class Times:
    """Of calls of one thing, in ms."""

    calls: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """Median, least and most, and how many there were."""
        ms = [round(call, 3) for call in (statistics.median(self.calls), min(self.calls), max(self.calls))]
        return {"ms": ms[0], "ms_min": ms[1], "ms_max": ms[2], "rounds": len(self.calls)}


def time_calls(fn: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    """ms of each call; on a GPU by events around it, so that launch overhead which the device hides is not counted."""
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

    Inputs stay where they are: one larger than the cache is read from memory, a smaller one from the cache, where a
    model has just put it.
    """
    once = time_calls(fn, device, calls=warm)[-1]
    calls = max(least, min(most, int(budget_s * 1000 / max(once, 1e-3))))
    return statistics.median(time_calls(fn, device, calls))


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, versions and the date (UTC): what a time means nothing without."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": dict(_versions(PACKAGES)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "sm": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "idle": gpu_state(),
        }
    return facts


def gpu_state() -> dict[str, str]:
    """Driver, power and clocks of the first GPU, as nvidia-smi words them; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    line = [tool, f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", "--id=0"]
    told = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603 - words of ours alone
    return dict(zip(NVIDIA_SMI, (word.strip() for word in told.stdout.split(",")), strict=False))


def report(document: dict[str, Any], file: Path | None, *, quiet: bool = False) -> None:
    """Print the document as the last line of stdout, unless quiet; with a file, keep it there too, whole or not."""
    if file is not None:
        keep(document, file)
    if not quiet:
        print(json.dumps(document, separators=(",", ":")), flush=True)


def keep(document: dict[str, Any], file: Path) -> None:
    """Write the document to a file, whole or not at all."""
    with unfinished(file) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n")


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
