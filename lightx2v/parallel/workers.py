"""Worker processes, one a rank: started at the first job, kept for the next, ended with whoever started them."""

import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lightx2v.diffuse import Hooks
from lightx2v.offload.plan import DoesNotFitError
from lightx2v.parallel.agreement import StoppedElsewhereError
from lightx2v.parallel.gain import Gain
from lightx2v.parallel.jobs import (
    Alive,
    Cancel,
    Done,
    Failed,
    Job,
    Measure,
    Measured,
    Message,
    Outcome,
    Progress,
    RankError,
    Ready,
    Rest,
    Stopped,
    receive,
    send,
)

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]  # where this package is imported from
# Not -m: an interpreter that is shipped with its own list of paths does not look into its working directory.
BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from lightx2v.parallel.worker import main; main()"
SILENCE_S = 20.0  # without a sign of life, of which there is one a second
START_S = 180.0  # to import PyTorch and meet
SETTLE_S = 20.0  # for all ranks to answer once one of them failed, or the job was cancelled
END_S = 30.0  # for a killed process to be gone, which gives its GPU's memory back first
POLL_S = 0.05
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # which would tell of other processes


@dataclass
class _Rank:
    """One process, as it is seen from outside."""

    rank: int
    device: str
    process: subprocess.Popen[bytes]
    connection: "Connection[Any, Any]"
    heard: float  # time of the last message
    patience: float  # seconds without one: until the first, Python is still importing
    place: str = "starting"
    outcome: Outcome | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.device}, process {self.process.pid})"

    @property
    def failed(self) -> Failed:
        assert isinstance(self.outcome, Failed)
        return self.outcome


class Workers:
    """One process for each of `devices` ("cuda:0", "cpu", ...), which may name one device several times.

    Not for two threads at once. They end with `close`, when nobody holds this any longer, and with this process,
    however it ends.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        if sys.platform != "linux":
            raise RuntimeError(f"several processes for one video need Linux, as NCCL does; this is {sys.platform}")
        self.devices = tuple(devices)
        self._ranks: list[_Rank] = []
        self._ending: weakref.finalize | None = None
        self._steps = ""  # how far the job is

    def pids(self) -> tuple[int, ...]:
        """Of the processes, by rank; none before the first job."""
        return tuple(rank.process.pid for rank in self._ranks)

    def run(self, job: Job, hooks: Hooks) -> list[Done]:
        """What each rank answers.

        hooks: on_step is given what rank 0 is at (and its estimate only where `job.previews`), on_block is called many
        times a second; whatever one of them raises stops all ranks and is raised here.
        Where device memory runs out, once more with a tighter plan. Raises RankError where a process ended or stopped
        answering, DoesNotFitError where memory runs out again, and what else the job raised in the first rank.
        """
        ranks, failed = self._asked(job.packed(), hooks)
        if failed is not None and failed.failed.shortage and failed.failed.plan is not None:
            log.warning("memory ran out in %s: once more with less of the model on each GPU", failed.name)
            ranks, failed = self._asked(replace(job.packed(), failed=failed.failed.plan), hooks)
        if failed is not None:
            raise _raised(failed)
        return [rank.outcome for rank in ranks if isinstance(rank.outcome, Done)]

    def measure(self, job: Job, hooks: Hooks) -> Gain | None:
        """A step of the job on one device and on all; None where it makes no finite numbers. Raises as `run` does."""
        ranks, failed = self._asked(Measure(job.packed()), hooks)
        if failed is not None:
            raise _raised(failed)
        (seconds,) = (rank.outcome.seconds for rank in ranks if isinstance(rank.outcome, Measured))
        return None if seconds is None else Gain(*seconds)

    def _asked(self, task: Message, hooks: Hooks) -> "tuple[list[_Rank], _Rank | None]":
        """All ranks with their answers, and one that failed, if any did: that whose own error it was."""
        self._require_running(hooks)
        try:
            self._say(task)
        except RankError as error:  # lost since the last job
            log.warning("%s", error)
            self._require_running(hooks)
            self._say(task)
        self._listen(hooks)
        ranks = list(self._ranks)
        if any(rank.outcome is None for rank in ranks):
            self.close()  # they wait for one that failed, for ever
        failed = [rank for rank in ranks if isinstance(rank.outcome, Failed)]
        failed.sort(key=lambda rank: isinstance(rank.failed.error, StoppedElsewhereError))
        return ranks, next(iter(failed), None)

    def rest(self) -> None:
        """Weights are given back; the processes stay."""
        if self._ranks:
            try:
                self._say(Rest())
                self._listen(Hooks())
            except RankError as error:
                log.warning("%s", error)

    def close(self) -> None:
        """End the processes; they start again with the next job."""
        if self._ending is not None:
            self._ending()
        self._ranks, self._ending = [], None

    def _require_running(self, hooks: Hooks) -> None:
        if gone := [rank for rank in self._ranks if rank.process.poll() is not None]:
            log.warning("%s %s since the last run: starting all again", gone[0].name, _how(gone[0].process))
            self.close()
        if self._ranks:
            return
        began = time.monotonic()
        meeting = os.memfd_create("lightx2v-ranks")  # a file that is gone when nobody has it open
        store = f"/proc/{os.getpid()}/fd/{meeting}"
        for rank, device in enumerate(self.devices):
            self._ranks.append(_start(rank, device, len(self.devices), store))
        self._ending = weakref.finalize(self, _end, list(self._ranks), meeting)
        self._listen(hooks, limit=START_S)
        if late := next((rank for rank in self._ranks if rank.outcome is None), None):
            self.close()
            raise RankError(f"{late.name} did not start within {START_S:.0f} s. {self._ended()}")
        log.info("%d ranks started in %.1f s: %s", len(self._ranks), time.monotonic() - began, ", ".join(self.devices))

    def _say(self, message: Message) -> None:
        self._steps = ""
        for rank in self._ranks:
            rank.outcome, rank.heard, rank.place = None, time.monotonic(), "taking the job"
            try:
                send(rank.connection, message)
            except OSError:
                raise self._lost(rank) from None

    def _listen(self, hooks: Hooks, limit: float | None = None) -> None:
        """Until every rank has answered, or so many seconds have passed; fewer once one has failed."""
        until = None if limit is None else time.monotonic() + limit
        while waiting := [rank for rank in self._ranks if rank.outcome is None]:
            try:
                self._hear(waiting, hooks.on_step)
                if hooks.on_block is not None:
                    hooks.on_block()
            except RankError:
                raise
            except BaseException:
                self._cancel()
                raise
            if until is None and any(isinstance(rank.outcome, Failed) for rank in self._ranks):
                until = time.monotonic() + SETTLE_S
            if until is not None and time.monotonic() > until:
                return

    def _hear(self, waiting: Sequence[_Rank], on_step: Callable[..., None]) -> None:
        """What has come, or nothing after a moment."""
        by_end: dict[object, _Rank] = {rank.connection: rank for rank in waiting}
        ready = [by_end[end] for end in wait([rank.connection for rank in waiting], POLL_S)]
        for rank in ready:
            try:
                message = receive(rank.connection)
            except (EOFError, OSError):
                raise self._lost(rank) from None
            rank.heard, rank.patience = time.monotonic(), SILENCE_S
            if isinstance(message, Alive):
                rank.place = message.place
            elif isinstance(message, Progress):
                self._steps = f", {message.step.index + 1} of {message.step.total} steps done"
                on_step(message.step, message.x0)
            elif isinstance(message, Ready | Done | Measured | Stopped | Failed):
                rank.outcome = message
        silent = [rank for rank in waiting if rank not in ready and time.monotonic() - rank.heard > rank.patience]
        # where this process itself was held up, their messages lie here unread
        for rank in silent:
            if rank.process.poll() is not None or not rank.connection.poll():
                raise self._silent(rank)

    def _cancel(self) -> None:
        """Every rank stops at the same place, or is ended."""
        until = time.monotonic() + SETTLE_S
        try:
            for rank in self._ranks:
                if rank.outcome is None:
                    send(rank.connection, Cancel())
            while waiting := [rank for rank in self._ranks if rank.outcome is None]:
                self._hear(waiting, lambda step, x0: None)
                if time.monotonic() > until:
                    log.warning("cancelled while %s: that takes long, so all ranks are ended", waiting[0].place)
                    return self.close()
        except (RankError, OSError) as error:
            log.warning("while cancelling: %s", error)
            self.close()

    def _lost(self, rank: _Rank) -> RankError:
        try:
            rank.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        how = _how(rank.process)
        self.close()
        return RankError(f"{rank.name} {how}, last at: {rank.place}{self._steps}. {self._ended()}")

    def _silent(self, rank: _Rank) -> RankError:
        self.close()
        return RankError(
            f"{rank.name} gave no sign of life for {rank.patience:.0f} s, last at: {rank.place}{self._steps}. "
            f"{self._ended()}"
        )

    def _ended(self) -> str:
        return f"All {len(self.devices)} processes were ended, and start again with the next run"


def _start(rank: int, device: str, size: int, store: str) -> _Rank:
    ours, theirs = Pipe()
    try:
        flags = ["-s"] if sys.flags.no_user_site else []
        arguments = [str(ROOT), str(rank), str(size), device, str(theirs.fileno()), store, str(os.getpid())]
        process = subprocess.Popen(  # noqa: S603  (Python itself, with arguments made here)
            [sys.executable, *flags, "-c", BOOT, *arguments],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=_environment(size),
            pass_fds=[theirs.fileno()],
        )
    finally:
        theirs.close()
    return _Rank(rank, device, process, ours, time.monotonic(), START_S)


def _environment(size: int) -> dict[str, str]:
    """Ranks talk on this machine alone, and share its cores."""
    cores = max(1, (os.cpu_count() or 1) // size)
    usual = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(cores)}
    inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    return {**usual, **inherited}


def _end(ranks: Sequence[_Rank], meeting: int) -> None:
    """Nothing of theirs is worth waiting for, so they are killed. Leaves no zombie."""
    os.close(meeting)
    for rank in ranks:
        rank.connection.close()
        rank.process.kill()
    until = time.monotonic() + END_S
    for rank in ranks:
        try:
            rank.process.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("%s does not end: its GPU's driver may hang", rank.name)


def _how(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is None or code >= 0:
        return f"ended with status {code} (its messages are in the log)"
    more = ": the system does that when RAM runs out, or somebody did" if -code == signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.Signals(-code).name}{more})"


def _raised(rank: _Rank) -> Exception:
    """The error of a rank, with where it came from."""
    failed = rank.failed
    cause = RankError(f"in {rank.name}:\n{failed.traceback}")
    if not failed.shortage:
        failed.error.__cause__ = cause
        return failed.error
    said = str(failed.error).partition("\n")[0]
    error = DoesNotFitError(
        f"GPU memory ran out in {rank.name} ({said}): make the video smaller, let blocks pass through the GPU (offload "
        "'block'), or close what else uses that GPU"
    )
    error.__cause__ = cause
    return error
