"""A server that answers as ComfyUI does, makes one small file of each prompt, and can be killed and started again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse


class StubComfyUI:
    """polls: how often a prompt is asked for until it is made. on_ask: called with every path, before the answer."""

    def __init__(self, polls: int = 1) -> None:
        self.polls = polls
        self.on_ask: Callable[[str], None] = lambda path: None
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda graph: None
        self.made: list[str] = []  # names of the files, in the order they were made
        self.cancelled: list[str] = []
        self._left: dict[str, int] = {}
        self._graphs: dict[str, dict[str, Any]] = {}
        self._queued = 0
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Answer, at the same address as before; what was queued is forgotten."""
        self.forget()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler(self._answers))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def forget(self) -> None:
        """What is queued, as a server does that is started again."""
        self._left.clear()

    def kill(self) -> None:
        """Answer no more, not even what has been asked."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def dead(self) -> bool:
        return self._server is None

    def _answers(self, path: str, body: Any) -> tuple[int, bytes] | None:
        self.on_ask(path)
        return None if self.dead else self.answer(path, body)

    def answer(self, path: str, body: Any) -> tuple[int, bytes]:
        where = urlparse(path)
        if where.path == "/prompt":
            if said := self.refuse(body["prompt"]):
                return 400, json.dumps({"error": {"message": said, "details": ""}, "node_errors": {}}).encode()
            self._queued += 1
            prompt = f"p{self._queued}"
            self._left[prompt], self._graphs[prompt] = self.polls, body["prompt"]
            return 200, json.dumps({"prompt_id": prompt, "node_errors": {}}).encode()
        if where.path.startswith("/history/"):
            return 200, json.dumps(self._history(where.path.rsplit("/", 1)[1])).encode()
        if where.path == "/queue" and body is None:
            running = [[0, prompt, {}] for prompt, left in self._left.items() if left]
            return 200, json.dumps({"queue_running": running, "queue_pending": []}).encode()
        if where.path == "/queue":
            self.cancelled += body["delete"]
            return 200, b""
        if where.path == "/interrupt":
            return 200, b""
        if where.path == "/view":
            return 200, parse_qs(where.query)["filename"][0].encode()
        return 404, b"not found"

    def _history(self, prompt: str) -> dict[str, Any]:
        if prompt not in self._left:
            return {}
        self._left[prompt] = max(self._left[prompt] - 1, 0)
        if self._left[prompt]:
            return {}
        name = self._graphs[prompt]["1"]["inputs"]["filename_prefix"]
        seed = self._graphs[prompt]["1"]["inputs"].get("seed", 0)
        if f"{name}-{seed}" not in self.made:
            self.made.append(f"{name}-{seed}")
        saved = [{"filename": f"{name}.mp4", "subfolder": str(seed), "type": "output"}]
        return {prompt: {"status": {"status_str": "success"}, "outputs": {"1": {"images": saved}}}}


def handler(answers: Callable[[str, Any], tuple[int, bytes] | None]) -> type[BaseHTTPRequestHandler]:
    """answers: path and JSON -> status and body; None: no word any more."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            found = answers(self.path, json.loads(self.rfile.read(size)) if size else None)
            if found is None:
                self.close_connection = True
                return
            status, answer = found
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = reply

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
