"""Spreads workflows over several ComfyUI servers, each of which makes one video at a time, and fetches what they save.

    python dev.py run examples/queue_many_servers.py --servers http://gpu1:8188 http://gpu2:8188 \\
        --output clips --seeds 1 2 3 4 -- workflows/wan_t2v.api.json workflows/wan_i2v.api.json

Every workflow is made once with each seed. A server that dies loses nothing: what it was making goes to another, and it
is used again when it answers again. A workflow that a server refuses or fails is tried on each of the others. Files are
in OUTPUT/<workflow>-<seed>/; OUTPUT/summary.json names each job, its server, seconds and files, or why it failed on
which server. Exit status 0 if all were made. Ctrl+C stops what runs on the servers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from lightx2v.comfyui import ForgottenError, Server, ServerError, UnreachableError, read_graph

TRIES, PAUSE = 3, 2.0  # of a server that does not answer, and seconds between them, before its job goes to another
LIVES = 3  # servers that may die while they make a job before it is held to be the job's fault
SEEDS = ("seed", "noise_seed")  # inputs of nodes


@dataclass
class Job:
    """One workflow with one seed. tried: why it failed, by server. deaths: of servers, while they made it.
    files: None until it is made."""

    name: str
    graph: Mapping[str, Any]
    tried: dict[str, str] = field(default_factory=dict)
    deaths: int = 0
    server: str = ""
    seconds: float = 0.0
    files: list[Path] | None = None

    def told(self) -> dict[str, Any]:
        """As the summary has it."""
        if self.files is None:
            return {"job": self.name, "made": False, "tried": self.tried}
        files = [str(path) for path in self.files]
        return {
            "job": self.name,
            "made": True,
            "server": self.server,
            "seconds": round(self.seconds, 1),
            "files": files,
        }


class Board:
    """The jobs that wait, for the servers that still work; safe between threads."""

    def __init__(self, jobs: Iterable[Job], servers: Iterable[str]) -> None:
        self._waiting, self._running = list(jobs), 0
        self._servers = set(servers)
        self._changed = threading.Condition()

    def take(self, server: str) -> Job | None:
        """The next job that has not failed on this server; waits while another may give one back. None: no more."""
        with self._changed:
            while True:
                for job in self._waiting:
                    if server not in job.tried:
                        self._waiting.remove(job)
                        self._running += 1
                        return job
                if not self._running:
                    return None
                self._changed.wait()

    def end(self, job: Job, *, again: bool) -> None:
        """A job that was taken is made, or goes back to the others' turn."""
        with self._changed:
            self._running -= 1
            if again:
                self._waiting.insert(0, job)
            self._changed.notify_all()

    def work_is_left(self, server: str) -> bool:
        """Whether there is a job for it, or may still be."""
        with self._changed:
            return bool(self._running) or any(server not in job.tried for job in self._waiting)


class Worker(threading.Thread):
    """Gives one server job after job, until there are none or it stays dead for `patience` seconds."""

    def __init__(self, server: Server, board: Board, output: Path, patience: float) -> None:
        super().__init__(daemon=True)
        self.server, self.board, self.output, self.patience = server, board, output, patience
        self.prompt: str | None = None  # what the server is making, or was when it died

    def run(self) -> None:
        while (job := self.board.take(self.server.url)) is not None:
            dead = False
            try:
                self.make(job)
            except (UnreachableError, ForgottenError) as error:
                dead = isinstance(error, UnreachableError)
                self.blame(job, str(error))
            except Exception as error:  # refused, failed, or its files cannot be written: the others may fare better
                job.tried[self.server.url], self.prompt = str(error) or type(error).__name__, None
                self.say(job, f"failed: {error}")
            finally:
                self.board.end(job, again=job.files is None)
            if dead and not self.comes_back():
                return

    def make(self, job: Job) -> None:
        began = time.monotonic()
        self.prompt = self.server.queue(job.graph)
        outputs = self.followed(job, self.prompt)
        try:
            files = list(self.server.fetch(outputs, self.output / job.name))
        except (OSError, HTTPException):
            self.server.before("")  # raises UnreachableError where it died in the middle of a file
            raise
        self.prompt, job.server, job.seconds, job.files = None, self.server.url, time.monotonic() - began, files
        self.say(job, f"made in {job.seconds:.0f} s")

    def blame(self, job: Job, words: str) -> None:
        """Note that the server died or started again; a job that servers keep dying of is not given to them again."""
        self.say(job, f"{words}; whichever server is next takes it")
        job.deaths += self.prompt is not None
        if job.deaths >= LIVES:
            job.tried[self.server.url] = f"{job.deaths} servers died while they made it, this one too: {words}"

    def followed(self, job: Job, prompt: str) -> Mapping[str, Any]:
        """Its outputs; a server that is silent for a moment is asked again."""
        for attempt in range(TRIES):
            try:
                return self.server.follow(prompt, lambda words: self.say(job, words))
            except UnreachableError:
                if attempt + 1 == TRIES:
                    raise
                time.sleep(PAUSE)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def comes_back(self) -> bool:
        """Wait for a dead server while there is work, and stop what it was making, which another makes by now."""
        until = time.monotonic() + self.patience
        while time.monotonic() < until and self.board.work_is_left(self.server.url):
            try:
                self.stop()
                return True
            except ServerError:
                time.sleep(PAUSE)
        return False

    def stop(self) -> None:
        """End on the server what it makes of ours."""
        if self.prompt is not None:
            self.server.cancel(self.prompt)
            self.prompt = None
        else:
            self.server.before("")  # only asks whether it answers

    def say(self, job: Job, words: str) -> None:
        print(f"{self.server.url}: {job.name}: {words}", file=sys.stderr, flush=True)


def jobs_of(files: Sequence[Path], seeds: Sequence[int]) -> list[Job]:
    """Every file with every seed, each under a name of its own. Raises ValueError for a file that is no workflow."""
    jobs: dict[str, Job] = {}
    each: Sequence[int | None] = seeds or [None]
    for file in files:
        graph = read_graph(file)
        for seed in each:
            name = bare = file.name.removesuffix(".json").removesuffix(".api") + ("" if seed is None else f"-{seed}")
            number = 1
            while name in jobs:
                number += 1
                name = f"{bare}-{number}"
            jobs[name] = Job(name, graph if seed is None else seeded(graph, seed))
    return list(jobs.values())


def seeded(graph: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The workflow with this in every seed that is a number and not a link to another node."""

    def changed(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: seed if name in SEEDS and isinstance(old, int) else old for name, old in inputs.items()}

    return {node: {**told, "inputs": changed(told["inputs"])} for node, told in graph.items()}


def summarise(jobs: Sequence[Job], output: Path) -> int:
    """Write and print what became of each job; how many were not made."""
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f".summary.{os.getpid()}.partial"
    partial.write_text(json.dumps([job.told() for job in jobs], indent=1), encoding="utf-8")
    partial.replace(output / "summary.json")
    for job in jobs:
        if job.files is not None:
            print(f"{job.name}: {', '.join(map(str, job.files)) or 'saved no file'} ({job.server})")
        else:
            why = "; ".join(f"{server}: {words}" for server, words in job.tried.items())
            print(f"{job.name}: NOT MADE: {why or 'no server was left to make it'}")
    failed = sum(job.files is None for job in jobs)
    print(f"{len(jobs) - failed} of {len(jobs)} made, see {output / 'summary.json'}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflows", nargs="+", type=Path, help="in API format: .api.json")
    parser.add_argument("--servers", nargs="+", required=True, metavar="URL", help="such as http://127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("clips"), help="folder for the files; default: clips")
    parser.add_argument("--seeds", nargs="+", type=int, default=(), help="each workflow once with each of these")
    parser.add_argument("--patience", type=float, default=120, help="seconds that a dead server has to come back (120)")
    options = parser.parse_args(arguments)
    jobs, urls = jobs_of(options.workflows, options.seeds), list(dict.fromkeys(u.rstrip("/") for u in options.servers))
    board = Board(jobs, urls)
    workers = [Worker(Server(url), board, options.output, options.patience) for url in urls]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        for worker in workers:
            try:
                worker.stop()
            except ServerError as error:
                print(error, file=sys.stderr)
        summarise(jobs, options.output)
        return 130
    return min(summarise(jobs, options.output), 1)


if __name__ == "__main__":
    sys.exit(main())
