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
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from lightx2v.parallel.jobs import Alive, Cancel, Message, Outcome, Ready, receive, send
from lightx2v.parallel.rank import Rank

PR_SET_PDEATHSIG = 1  # prctl(2)
BEAT_S = 1.0


class Wire:
    """The worker's end of the pipe."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._tasks: SimpleQueue[Message] = SimpleQueue()
        self._busy = threading.Event()
        self._stop = threading.Event()
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
                self._stop.set()
                continue
            self._stop.clear()
            self._busy.set()
            self._tasks.put(message)

    def _beat(self) -> None:
        while True:
            self._busy.wait()
            self.send(Alive(self.place))
            threading.Event().wait(BEAT_S)

    def cancelled(self) -> bool:
        """Whether what runs was cancelled."""
        return self._stop.is_set()

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
