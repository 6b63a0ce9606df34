"""What runs in a worker process: one rank, which does the jobs that come through its pipe until the other end closes.

Started by `workers.py`, never by hand. Three threads: the main one works; one reads the pipe, so that a cancel is seen
while a block computes and the process ends as soon as nobody is at the other end; one says every second that it lives.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightx2v.cache.choice import choose
from lightx2v.cache.walk import CacheReport
from lightx2v.diffuse import Hooks, diffuse
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.offload import Asked
from lightx2v.offload.shortage import free_unused, ran_out
from lightx2v.parallel.jobs import (
    Alive,
    Cancel,
    Done,
    Failed,
    Job,
    Message,
    Outcome,
    Progress,
    Ready,
    Rest,
    Stopped,
    own,
    receive,
    send,
    sendable,
)
from lightx2v.parts import Parts
from lightx2v.sampling import Step

log = logging.getLogger("lightx2v.parallel")
PR_SET_PDEATHSIG = 1  # prctl(2)
BEAT_S = 1.0
COLLECTIVE_LIMIT = timedelta(minutes=30)  # ranks read their weights at their own pace, slow disks included


class Cancelled(Exception):
    """All ranks raise it at the same place."""


class Wire:
    """The worker's end of the pipe."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._tasks: SimpleQueue[Message] = SimpleQueue()
        self._busy = threading.Event()
        self.cancelled = threading.Event()
        self.place = "starting"
        self._busy.set()
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                message = receive(self._connection)
            except (EOFError, OSError):
                os._exit(0)  # whoever asked is gone; nothing here is worth keeping, and no collective may hold this up
            if isinstance(message, Cancel):
                self.cancelled.set()
                continue
            self.cancelled.clear()
            self._busy.set()
            self._tasks.put(message)

    def _beat(self) -> None:
        while True:
            self._busy.wait()
            self.send(Alive(self.place))
            threading.Event().wait(BEAT_S)

    def task(self) -> Message:
        """Waits for the next thing to do."""
        return self._tasks.get()

    def send(self, message: Message) -> None:
        with self._sending:
            try:
                send(self._connection, message)
            except OSError:
                os._exit(0)

    def answer(self, outcome: Outcome) -> None:
        """The last message of a task: nobody reads until there is another."""
        self._busy.clear()
        self.send(outcome)


class Rank:
    """One of `size` processes; it has joined the others."""

    def __init__(self, wire: Wire, rank: int, size: int, device: torch.device, store: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=COLLECTIVE_LIMIT
        )
        self._wire, self._rank, self._device = wire, rank, device
        self._control = dist.new_group(backend="gloo")
        self._infos: tuple[CheckpointInfo, ...] = ()
        self._versions: tuple[object, ...] = ()
        self._parts = Parts(None, (), device)

    def work(self, task: Message) -> Outcome:
        """Do a task; never raises."""
        try:
            if isinstance(task, Job):
                return self._sample(task)
            if isinstance(task, Rest):
                self._rest()
            return Ready()
        except Cancelled:
            return Stopped()
        except Exception as error:
            failed = Failed(sendable(error), traceback.format_exc(), ran_out(error), self._parts.plan)
        free_unused()  # what failed is held by its own error until here
        return failed

    def _rest(self) -> None:
        self._parts.forget_transformers()
        free_unused()

    def _sample(self, job: Job) -> Done:
        infos = self._use(job.transformers)
        reports: list[CacheReport] = []
        cache = choose(job.cache, infos, reports.append)
        asked = Asked(job.shape, cache is not None, job.loras, failed=job.failed)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._wire.place = "reading weights"
        with self._parts.model(job.engine, job.loras, "auto", asked) as model:
            hooks = _Hooks(self._wire, self._agree, self._rank == 0, job.previews)
            on = Hooks(hooks.on_step, hooks.on_block)
            latents = diffuse(model, job.start, job.sampling, job.cond, job.uncond, hooks=on, cache=cache)
        done = Done(latents, tuple(self._parts.said(reports))) if self._rank == 0 else Done(None)
        if self._device.type != "cuda":
            return done
        torch.cuda.empty_cache()  # others may decode on this device now
        peak, held = torch.cuda.max_memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        return replace(done, peak=peak, held=held)

    def _use(self, paths: tuple[Path, ...]) -> tuple[CheckpointInfo, ...]:
        """These transformers from now on; read again where a file has changed since."""
        infos = tuple(identify(path) for path in paths)
        files = sorted({tensor.file for info in infos for tensor in info.header.tensors.values()})
        versions = (*paths, *((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
        if versions != self._versions:
            self._parts.use_transformers(infos)
            self._infos, self._versions = infos, versions
        return self._infos

    def _agree(self) -> None:
        """Raise Cancelled on every rank, or on none: rank 0 decides.

        Each rank comes here equally often: ranks walk the same blocks. The message goes through main memory, so that
        no GPU is waited for; it takes less than 0.1 ms.
        """
        flag = torch.tensor([int(self._wire.cancelled.is_set())], dtype=torch.int32)
        dist.broadcast(flag, 0, group=self._control)
        if flag.item():
            raise Cancelled


class _Hooks:
    """What a rank does between blocks and after steps."""

    def __init__(self, wire: Wire, agree: Callable[[], None], leads: bool, previews: bool) -> None:
        self._wire, self._agree, self._leads, self._previews = wire, agree, leads, previews
        self._step, self._blocks = "before the first step", 0

    def on_block(self) -> None:
        self._agree()
        self._blocks += 1
        self._wire.place = f"{self._step}, call {self._blocks} of a block"

    def on_step(self, step: Step, x0: Tensor) -> None:
        self._agree()
        self._step, self._blocks = f"step {step.index + 2} of {step.total}", 0
        if self._leads:
            self._wire.send(Progress(step, own(x0) if self._previews else None))


def end_with(parent: int) -> None:
    """End when the parent does, even while this process is stopped or stuck: the pipe ends it in every other case."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def main() -> None:
    """Arguments: rank, number of ranks, device, descriptor of the pipe, file to meet at, process id of the parent."""
    rank, size, device, descriptor, store, parent = sys.argv[1:]
    end_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the parent, which decides
    logging.basicConfig(level=logging.WARNING, format=f"[rank {rank}] %(message)s")
    if rank == "0":
        logging.getLogger("lightx2v").setLevel(logging.INFO)
        logging.getLogger("lightx2v_kernels").setLevel(logging.INFO)
    wire = Wire(Connection(int(descriptor)))
    here = Rank(wire, int(rank), int(size), torch.device(device), store)
    wire.answer(Ready())
    while True:
        wire.answer(here.work(wire.task()))


if __name__ == "__main__":
    main()
