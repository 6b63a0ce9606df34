"""Hostile files for as long as there is time: `python -m dev.fuzz --minutes 10 [--reader NAME] [--engine atheris]`.

The files and their mutations are those of tests/hostile, which throws its dice a few times in every test run. Here a
child process with little memory of its own reads one file after the other, and another takes its place where it dies.
`--engine atheris` lets libFuzzer throw the dice, led by which lines of lightx2v ran; without it they are random.
What is found is printed with its seed: `--seed N --inputs 1` makes the same file again.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dev.environment import REPOSITORY

SLOW = 20  # seconds of the processor for one file
STUCK = 600  # seconds by the clock: then it waits for something
CLEAR = ("read", "refused")
FAST = Path("/dev/shm")  # noqa: S108 - memory, in which each file gets a folder of its own


class TooSlow(BaseException):
    """Raised by the alarm; none of Exception, so that no reader takes it for damage."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every error was clear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all readers together; default: 1")
    parser.add_argument("--reader", action="append", help="may be given several times; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the first file; the next has the next; default: 1")
    parser.add_argument("--inputs", type=int, default=1 << 62, help="of each reader at most")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(REPOSITORY / "tests"))
    if options.child:
        return _child(options)
    from hostile.readers import READERS

    names = options.reader or list(READERS)
    failed = 0
    for name in names:
        failed += _read_by(name, options, options.minutes * 60 / len(names))
    return 1 if failed else 0


def _read_by(name: str, options: argparse.Namespace, seconds: float) -> int:
    """Children one after the other until time is up; prints one line, and returns how many errors were not clear."""
    counts: Counter[str] = Counter()
    peak, base, seed, died = 0, 0, options.seed, 0
    ends = time.monotonic() + seconds
    last = options.seed + options.inputs
    while time.monotonic() < ends and seed < last:
        line = [sys.executable, "-m", "dev.fuzz", "--child", name, "--seed", str(seed), "--engine", options.engine]
        line += ["--minutes", str((ends - time.monotonic()) / 60), "--inputs", str(last - seed)]
        run = subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        for text in run.stdout:
            if not text.startswith("{"):
                print(text, end="", flush=True)
                continue
            told = json.loads(text)
            counts += Counter(told["counts"])
            peak, base, seed = max(peak, told["peak"]), told["base"], told["next"]
        if run.wait():
            died += 1
            counts[f"DIED with status {run.returncode}"] += 1
            print(f"{name}: the child died with status {run.returncode} at seed {seed}", flush=True)
            seed += 1
    unclear = sum(count for what, count in counts.items() if what.partition(" ")[0] not in CLEAR)
    types = ", ".join(f"{what}: {count}" for what, count in counts.most_common())
    print(
        f"{name}: {counts.total()} inputs ({types}); unexpected: {unclear}; "
        f"peak {peak >> 20} MB, before the first {base >> 20} MB",
        flush=True,
    )
    return unclear


class _Tally:
    """What became of the files of one child; told every second or so, so that little is lost with it."""

    def __init__(self, name: str, seed: int) -> None:
        from hostile.readers import READERS

        self.name, self.reader, self.next = name, READERS[name], seed
        self._counts: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._told = time.monotonic()
        self._base = _peak()

    def take(self, case: Any, what: str) -> None:
        """what: how to make the case again, in words."""
        from hostile.readers import outcome

        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=FAST if FAST.is_dir() else None))
        signal.setitimer(signal.ITIMER_PROF, SLOW)
        signal.alarm(STUCK)
        try:
            said, error = outcome(self.reader, case.write(folder))
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(folder, ignore_errors=True)
        if said in CLEAR:
            self._counts[said if error is None else f"{said} with {type(error).__name__}"] += 1
        else:
            self._counts[said] += 1
            self._show(said, error, what)
        self.next += 1
        if time.monotonic() - self._told > 1:
            self.tell()

    def _show(self, said: str, error: BaseException | None, what: str) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1] if error else None
        if (where := f"{said} {place.filename}:{place.lineno}" if place else said) not in self._seen:
            self._seen.add(where)
            print(f"{self.name}, {what}: {where}: {str(error)[:300]!r}", flush=True)

    def tell(self) -> None:
        print(json.dumps({"counts": self._counts, "peak": _peak(), "base": self._base, "next": self.next}), flush=True)
        self._counts.clear()
        self._told = time.monotonic()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _child(options: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if options.engine == "atheris":
        return _led(options)
    from hostile.mutators import Seeded

    tally, ends = _prepared(options), time.monotonic() + options.minutes * 60
    last = options.seed + options.inputs
    while time.monotonic() < ends and tally.next < last:
        tally.take(tally.reader.make(Seeded(tally.next)), f"seed {tally.next}")
    tally.tell()
    return 0


def _prepared(options: argparse.Namespace) -> _Tally:
    """Everything imported and every valid file read once; then the limit on memory."""
    from hostile.readers import READERS

    for case in READERS[options.child].valid():
        with tempfile.TemporaryDirectory() as folder:
            READERS[options.child].read(case.write(Path(folder)))
    for each in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(each, _alarm)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + READERS[options.child].memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return _Tally(options.child, options.seed)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"took longer than {SLOW} s of the processor, or {STUCK} s by the clock")


def _led(options: argparse.Namespace) -> int:
    """libFuzzer throws the dice."""
    import atheris

    with atheris.instrument_imports(include=["lightx2v"]):
        from hostile import readers  # noqa: F401 - imported here so that what it imports is watched

    class Fuzzed:
        def __init__(self, raw: bytes) -> None:
            self._data = atheris.FuzzedDataProvider(raw)

        def number(self, low: int, high: int) -> int:
            return int(self._data.ConsumeIntInRange(low, high))

    tally = _prepared(options)

    def one(raw: bytes) -> None:
        tally.take(tally.reader.make(Fuzzed(raw)), f"bytes {raw.hex()[:2000]}")

    seconds = max(1, int(options.minutes * 60))
    flags = [f"-max_total_time={seconds}", f"-runs={min(options.inputs, 2**31 - 1)}", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, f"-seed={options.seed}", "-max_len=4096", "-len_control=0"], one)
    import atexit

    atexit.register(tally.tell)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
