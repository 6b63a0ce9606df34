"""Several processes over gloo on this machine: `Ranks(n)` runs a function in all of them, as often as wanted."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dev.comfyui import find_comfyui
from dev.environment import HOST_PACKAGES


class Ranks:
    """n processes of one gloo group, one torch thread each.

        with Ranks(2) as ranks:
            results = ranks.run(function, *args)

    They start once, which takes seconds; what they import and keep, they keep.
    """

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self.size, self._timeout = size, timeout
        context, port = mp.get_context("spawn"), _free_port()
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes: list[Connection] = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        with _own_path():
            for process in self._processes:
                process.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) returns in each process, in order of rank.

        function: importable by name, as `module.function`. Raises the first failing rank's traceback as RuntimeError,
        and TimeoutError naming the ranks that do not answer; both end all processes.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout
        try:
            while len(answers) < self.size:
                waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer in {self._timeout:g} s")
                for pipe in ready:
                    answers[waiting[pipe]] = self._answer(pipe, waiting[pipe])
        except BaseException:
            self.close()
            raise
        return [answers[rank] for rank in range(self.size)]

    def _answer(self, pipe: Any, rank: int) -> Any:
        try:
            good, answer = pipe.recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} of {self.size} died") from None
        if not good:
            raise RuntimeError(f"rank {rank} of {self.size}:\n{answer}")
        return answer

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """The same for one function: processes that start, run it and end."""
    with Ranks(size, timeout) as ranks:
        return ranks.run(function, *args)


@contextmanager
def _own_path() -> Iterator[None]:
    """What other tests took from ComfyUI into this process is not for others: its torchvision may not load there."""
    before = list(sys.path)
    sys.path[:] = [place for place in before if Path(place) not in (HOST_PACKAGES, find_comfyui())]
    try:
        yield
    finally:
        sys.path[:] = before


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # nothing here runs Triton, and nothing shall by accident
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the tests ended without a word
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
