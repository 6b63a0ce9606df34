"""A headless Chromium spoken to over its DevTools protocol: open a page, run JavaScript in it, look at it."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

_FLAGS = (
    "--headless",
    "--remote-debugging-port=0",
    # Containers and CI run as root, where the sandbox refuses to start; the only page opened is the tests' own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",
)
_START_SECONDS = 30


@contextmanager
def launch(executable: Path, profile: Path, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """Start the browser with an empty `profile` folder and yield its one page, `width` by `height` pixels."""
    line = [str(executable), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with (profile / "chromium.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = _debugger_address(process, profile)
        with asyncio.Runner() as runner:
            page = runner.run(_connect(address, runner))
            try:
                page.send(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                yield page
            finally:
                runner.run(page.session.close())
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        process.wait()


def _debugger_address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The socket of the first page; the browser writes the port it chose into its profile."""
    announced = profile / "DevToolsActivePort"
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if announced.exists() and (lines := announced.read_text().splitlines()):
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=5) as answer,
            ):
                for target in json.load(answer):
                    if target["type"] == "page":
                        return target["webSocketDebuggerUrl"]
        time.sleep(0.05)
    said = (profile / "chromium.log").read_text(errors="replace")
    raise AssertionError(f"Chromium did not start (exit status {process.poll()}):\n{said[-2000:]}")


async def _connect(address: str, runner: asyncio.Runner) -> Page:
    session = aiohttp.ClientSession()
    page = Page(session, await session.ws_connect(address, max_msg_size=0), runner)
    for domain in ("Page", "Runtime", "Network"):
        await page.call(f"{domain}.enable")
    return page


@dataclass
class Page:
    """One page. Its methods wait for the browser's answer.

    exceptions: JavaScript errors that nothing caught, with where they came from.
    console: what was written to the console as an error.
    failed_requests: status and address of every answer of 400 and more.
    """

    session: aiohttp.ClientSession
    socket: aiohttp.ClientWebSocketResponse
    runner: asyncio.Runner
    exceptions: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    failed_requests: list[str] = field(default_factory=list)
    _sent: int = 0

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; AssertionError with the browser's words if it fails."""
        return self.runner.run(self.call(method, **parameters))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        await self.socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=120)
            if message.get("id") != self._sent:
                self._note(message)
                continue
            if "error" in message:
                raise AssertionError(f"{method}: {message['error']}")
            return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.exceptions.append(_describe(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            words = (str(word.get("value", word.get("description", ""))) for word in parameters["args"])
            self.console.append(" ".join(words))
        elif method == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            self.failed_requests.append(f"{parameters['response']['status']} {parameters['response']['url']}")

    def open(self, url: str) -> None:
        """Start loading `url`; `wait_for` what shows that it has loaded."""
        self.send("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression, awaited if it is a promise; AssertionError if it throws."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression[:200]}: {_describe(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 60) -> Any:
        """The first value of `expression` that is true; AssertionError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {timeout_s} s: {expression[:200]}; uncaught errors: {self.exceptions}")

    def screenshot(self, path: Path) -> None:
        """Write what the page looks like to `path` as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


def _describe(details: dict[str, Any]) -> str:
    thrown = details.get("exception", {})
    where = f"{details.get('url', '')}:{details.get('lineNumber')}"
    return f"{thrown.get('description') or thrown.get('value') or details.get('text')} ({where})"
