"""Drive ComfyUI through its API as the page does: queue a graph, listen on the socket, collect what came of it."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from PIL import Image

Graph = Mapping[str, Mapping[str, Any]]

# Binary messages of the socket: a picture, and a picture led by a JSON text that names its node.
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4


@dataclass(frozen=True)
class Preview:
    """A picture shown on a node while it ran; node is "" where the server did not say which."""

    node: str
    image: Image.Image


@dataclass(frozen=True)
class Result:
    """How a graph ended.

    status: "success", "error", "interrupted", or "rejected" when the graph was refused before it ran.
    outputs: {node id: what the node gave its interface, such as {"text": [...]}}.
    events: every message of the socket, (type, data), in order.
    error: for "error" the server's report (node_id, node_type, exception_message, traceback, ...); for "rejected" its
        answer (error, node_errors).
    """

    status: str
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    events: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    previews: tuple[Preview, ...] = ()
    error: Mapping[str, Any] = field(default_factory=dict)

    def expect(self, status: str = "success") -> Result:
        """This result; AssertionError with the server's own words if it ended in another way."""
        if self.status != status:
            frames = "".join(self.error.get("traceback", ())).splitlines()
            traceback = "\n".join(line for line in frames if line.strip(" ^~"))
            raise AssertionError(f"the graph ended as {self.status!r}, not {status!r}: {self.message}\n{traceback}")
        return self

    @property
    def message(self) -> str:
        """What a person would read of the failure: the exception's message, or the words of a refused graph."""
        if self.status != "rejected":
            return str(self.error.get("exception_message", ""))
        details = [
            f"{problem['message']}: {problem['details']}"
            for node in self.error.get("node_errors", {}).values()
            for problem in node["errors"]
        ]
        return "\n".join([str(self.error.get("error", {}).get("message", "")), *details])

    @property
    def cached(self) -> frozenset[str]:
        """Nodes whose earlier result was used again."""
        return frozenset(node for kind, data in self.events if kind == "execution_cached" for node in data["nodes"])

    @property
    def progress(self) -> tuple[tuple[str, float, float], ...]:
        """Each report of a running node: (node id, done, total)."""
        return tuple(
            (node, state["value"], state["max"])
            for kind, data in self.events
            if kind == "progress_state"
            for node, state in data["nodes"].items()
            if state["state"] == "running"
        )

    def text(self, node: str) -> str:
        """The text that a node shows."""
        return "\n".join(self.outputs[node]["text"])

    def kept(self, node: str) -> Any:
        """What arrived at a FixtureKeep node, tensors and all."""
        return torch.load(self.outputs[node]["kept"][0], weights_only=True)

    def files(self, node: str, base: Path) -> tuple[Path, ...]:
        """The files that a save node wrote; base: the server's base directory."""
        listed = [entry for key in ("images", "video", "gifs") for entry in self.outputs[node].get(key, ())]
        return tuple(base / entry["type"] / entry["subfolder"] / entry["filename"] for entry in listed)


def fetch_json(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """GET `url`, or POST `body` to it as JSON. Returns the answer's JSON, None if it is empty; urllib's errors."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def queue(
    url: str,
    graph: Graph,
    *,
    interrupt_after: int | None,
    extra_data: Mapping[str, Any] | None,
    timeout_s: float,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Result:
    """Run `graph` on the server at `url`; TimeoutError if it has not ended after `timeout_s`."""
    run = _queue(url, graph, interrupt_after, extra_data or {}, on_progress)
    return asyncio.run(asyncio.wait_for(run, timeout_s))


async def _queue(
    url: str,
    graph: Graph,
    interrupt_after: int | None,
    extra_data: Mapping[str, Any],
    on_progress: Callable[[float], None],
) -> Result:
    client = uuid.uuid4().hex
    events: list[tuple[str, Mapping[str, Any]]] = []
    previews: list[Preview] = []
    async with (
        aiohttp.ClientSession(url) as session,
        session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as ws,
    ):
        await ws.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        body = {"prompt": graph, "client_id": client, "extra_data": extra_data}
        async with session.post("/prompt", json=body) as answer:
            accepted = await answer.json()
            if answer.status != 200:
                return Result("rejected", error=accepted)
        prompt = accepted["prompt_id"]
        async for message in ws:
            if message.type == aiohttp.WSMsgType.BINARY:
                previews += _preview(message.data)
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ConnectionError(f"the server closed the socket while the graph ran: {message}")
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            events.append((kind, data))
            if kind == "progress_state":
                on_progress(_done(data))
            if interrupt_after is not None and kind == "progress_state" and _done(data) >= interrupt_after:
                interrupt_after = None
                await session.post("/interrupt")
            if (
                kind in ("execution_success", "execution_error", "execution_interrupted")
                and data["prompt_id"] == prompt
            ):
                status, error = kind.removeprefix("execution_"), data
                break
        else:
            raise ConnectionError("the server closed the socket while the graph ran")
        outputs = await _outputs(session, prompt)
    return Result(status, outputs, tuple(events), tuple(previews), error if status == "error" else {})


def _done(data: Mapping[str, Any]) -> float:
    return max((node["value"] for node in data["nodes"].values() if node["state"] == "running"), default=0)


async def _outputs(session: aiohttp.ClientSession, prompt: str) -> Mapping[str, Mapping[str, Any]]:
    """The history's entry, which the server writes just after it announced the end."""
    for _ in range(200):
        async with session.get(f"/history/{prompt}") as answer:
            history = await answer.json()
        if prompt in history:
            return history[prompt]["outputs"]
        await asyncio.sleep(0.02)
    raise TimeoutError(f"the server announced the end of {prompt} but never listed it in its history")


def _preview(message: bytes) -> list[Preview]:
    kind, length = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
    if kind == _PREVIEW:
        return [Preview("", Image.open(io.BytesIO(message[8:])))]
    if kind == _PREVIEW_WITH_METADATA:
        metadata = json.loads(message[8 : 8 + length])
        return [Preview(str(metadata.get("node_id", "")), Image.open(io.BytesIO(message[8 + length :])))]
    return []
