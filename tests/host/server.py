"""Start a ComfyUI for the tests, and stop it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dev.comfyui import command, make_base
from host.client import Graph, Result, fetch_json, queue

BOOT_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A running ComfyUI.

    url: its address, "http://127.0.0.1:PORT".
    base: its folder of models, input, output and user.
    pid: of its process.
    """

    url: str
    base: Path
    log_path: Path
    pid: int = 0

    def run(
        self,
        graph: Graph,
        *,
        interrupt_after: int | None = None,
        extra_data: Mapping[str, Any] | None = None,
        timeout_s: float = 300,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> Result:
        """Queue an API-format graph ({id: {class_type, inputs}}) and wait until it ends, in whatever way.

        interrupt_after: press Cancel once a node reports this many steps done.
        on_progress: is told how many steps the running node has done, each time that it reports.
        """
        return queue(
            self.url,
            graph,
            interrupt_after=interrupt_after,
            extra_data=extra_data,
            timeout_s=timeout_s,
            on_progress=on_progress,
        )

    def get(self, path: str) -> Any:
        """GET a JSON document, such as "/object_info"."""
        return fetch_json(self.url + path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST a JSON document; returns the JSON of the answer, or None where it is empty."""
        return fetch_json(self.url + path, body)

    def log(self) -> str:
        """All that the server printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def start(
    comfyui: Path,
    base: Path,
    packs: Mapping[str, Path],
    model_roots: Sequence[Path],
    *,
    extra: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
    cpu: bool = True,
) -> Iterator[Server]:
    """Run ComfyUI on a free port of 127.0.0.1 with `packs` in custom_nodes; AssertionError if one fails to load.

    extra: arguments of its own. variables: of its environment, beside this process's. cpu: compute on
    it, also where there is a GPU.
    """
    make_base(base, packs, model_roots)
    port = _free_port()
    server = Server(f"http://127.0.0.1:{port}", base, base / "server.log")
    extra = ["--cpu", *extra] if cpu else extra
    line = command(Path(sys.executable), comfyui, base, listen="127.0.0.1", port=port, extra=extra)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    # In a session of its own, so that stopping reaches whatever it has started.
    with server.log_path.open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        _wait_until_ready(process, server)
        _assert_loaded(server, packs)
        yield replace(server, pid=process.pid)
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/system_stats", timeout=5).close()
            return
        time.sleep(0.1)
    state = "still booting" if process.poll() is None else f"exit status {process.returncode}"
    raise AssertionError(f"ComfyUI did not answer ({state}); the end of its log:\n{server.log()[-4000:]}")


def _assert_loaded(server: Server, packs: Mapping[str, Path]) -> None:
    """ComfyUI boots, and exits 0, even when packs fail: only its log and its list of nodes tell."""
    log = server.log()
    for name in packs:
        home = str(server.base / "custom_nodes" / name)
        listed = [line for line in log.splitlines() if line.endswith(home)]
        end = log.find(f"Cannot import {home}")
        if end >= 0 or not listed or any("IMPORT FAILED" in line for line in listed):
            raise AssertionError(f"ComfyUI could not load {name}; its log:\n{log[max(0, end - 3000) : end + 1000]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
    process.wait()
