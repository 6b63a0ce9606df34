"""Which implementation is the fastest on this GPU: measured once, and remembered in a small file.

One file a GPU, type, head size and set of packages, in the user's cache directory. Whatever the figures depend on is
part of the file's name and of its contents, so nothing goes stale: another driver or package is another file.
"""

import hashlib
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
ROUNDS, ENOUGH_MS = 5, 1000  # of which the median counts; on a slow GPU no further one begins after that long
CALLS = 3  # a round, one behind the other: what Python takes to launch the next one then costs no time of its own
WARM_UP_MS = 30  # of work before the first timed call: an idle GPU's clock is low


@dataclass(frozen=True)
class Workload:
    """What is timed: a call as a model makes it, of about the size that a model has.

    arguments: (device, dtype, head_dim) -> the call's arguments.
    rows: picks a few rows of the op's first argument, and the same ones of the result, small enough for float64.
    inner: the call's arguments -> the op's, where the call does more than the op.
    function: (backend, device, dtype, head_dim) -> what is called.
    """

    arguments: Callable[[torch.device, torch.dtype, int], tuple[Any, ...]]
    rows: Callable[[Tensor], Tensor]
    inner: Callable[..., tuple[Tensor, ...]] = lambda *arguments: arguments
    function: Callable[..., Callable[..., Tensor]] = lambda backend, *place: backend.load()


@dataclass(frozen=True)
class Timings:
    """ms: name -> median milliseconds of one call. passed_over: name -> why it has no time."""

    ms: Mapping[str, float] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)


def measure(
    candidates: Mapping[str, Callable[..., Tensor]],
    arguments: tuple[Any, ...],
    why_wrong: Callable[[str, Tensor], str | None],
    milliseconds: Callable[[Callable[[], object]], float] | None = None,
) -> Timings:
    """Time every candidate on the same arguments, in turns, so that a drifting clock is fair to all.

    why_wrong: (name, its result) -> why it may not be taken; such a one has no time.
    milliseconds: runs a call and says how long the device took; CUDA events where it is None.
    Raises torch.OutOfMemoryError; anything else that a candidate raises is a reason to pass it over.
    """
    took = milliseconds or _cuda_ms
    ms: dict[str, list[float]] = {}
    passed_over: dict[str, str] = {}
    for name, function in candidates.items():
        try:
            reason = why_wrong(name, function(*arguments))  # which also compiles what is compiled on first use
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a vendor's build may fail with anything
            reason = f"at {tuple(arguments[0].shape)} it raised {type(error).__name__}: {error}"
        if reason:
            passed_over[name] = reason
        else:
            ms[name] = []
    calls = {name: partial(candidates[name], *arguments) for name in ms}
    spent = 0.0
    while calls and spent < WARM_UP_MS:
        spent += sum(took(call) for call in calls.values())
    for _ in range(ROUNDS):
        for name, call in calls.items():
            ms[name].append(took(call))
            spent += ms[name][-1]
        if spent > ENOUGH_MS:
            break
    return Timings({name: round(statistics.median(times), 4) for name, times in ms.items()}, passed_over)


def _cuda_ms(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def facts_of(device: torch.device, **more: object) -> dict[str, Any]:
    """All that figures of a GPU depend on, for `read` and `write`; `more` is what the caller knows beside it."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "driver": driver() if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "source": _source(),
        **more,
    }


def _source() -> str:
    """A digest of this package's own code: a changed kernel is timed anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def directory() -> Path:
    """Where timings are remembered: LIGHTX2V_CACHE, or lightx2v in the user's cache directory of this system."""
    if named := os.environ.get("LIGHTX2V_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lightx2v" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lightx2v"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightx2v"


def read(facts: Mapping[str, Any]) -> Timings | None:
    """What was measured under exactly these facts; None where nothing was. A file that is broken is as none."""
    try:
        path = _path(facts)
        if not path.exists():
            return None
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["facts"] != json.loads(json.dumps(facts)):
            raise ValueError("it is about something else")
        ms = {str(name): float(value) for name, value in held["ms"].items()}
        return Timings(ms, {str(name): str(why) for name, why in held["passed_over"].items()})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.info("remembered timings cannot be used and are measured again: %s: %s", type(error).__name__, error)
        return None


def write(facts: Mapping[str, Any], timings: Timings) -> None:
    """Remember. Where that is not possible, a line of log says so, and the next process measures again."""
    try:
        path = _path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"facts": facts, **asdict(timings)}, file, indent=1)
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        logger.info("timings are not remembered: %s; LIGHTX2V_CACHE may name a directory to write to", error)


def _path(facts: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return directory() / "timings" / f"{digest}.json"
