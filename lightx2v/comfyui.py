"""A ComfyUI server, over its HTTP API: queue a graph, follow it, fetch what it wrote (ComfyUI 0.3.75, server.py)."""

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightx2v import strict_json
from lightx2v.messages import readable
from lightx2v.unfinished import unfinished

JSON_BODY = {"Content-Type": "application/json"}
MAX_ANSWER = 256 << 20  # bytes; a history holds whole graphs
TIMEOUT = 30  # seconds for one answer
LISTS = ("images", "video", "gifs", "audio")  # of a node's outputs
MISSING_FILE, MISSING_NODE = "value_not_in_list", ("invalid_prompt", "missing_node_type")


class ServerError(ValueError):
    """What went wrong at the server, in words and with what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


class UnreachableError(ServerError):
    """No server answers there."""


class ForgottenError(ServerError):
    """The server knows nothing of what it was given: it was taken out of the queue, or the server started again."""


def read_graph(path: str | Path) -> dict[str, Any]:
    """A workflow in API format: node id -> class_type and inputs. Raises ValueError for any other file."""
    path = Path(path)
    try:
        graph = strict_json.read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a workflow's .api.json") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; export it again") from error
    if isinstance(graph, dict) and "nodes" in graph:
        raise ValueError(
            f"{path} is a workflow of the page: give its .api.json (on the page: Workflow, Export (API); of this "
            "pack's own workflows it lies beside)"
        )
    if not isinstance(graph, dict) or not graph:
        raise ValueError(f"{path} is no workflow in API format: expected nodes with class_type and inputs")
    wrong = [number for number, node in graph.items() if not _is_node(node)]
    if wrong:
        raise ValueError(
            f"{path} is no workflow in API format: node {wrong[0][:40]!r} is no object with class_type and inputs; "
            "export it again"
        )
    return graph


def _is_node(node: Any) -> bool:
    if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
        return False
    return isinstance(node.get("inputs", {}), dict) and isinstance(node.get("_meta", {}), dict)


@dataclass(frozen=True)
class Server:
    """url: as the browser has it, such as http://127.0.0.1:8188."""

    url: str

    def queue(self, graph: Mapping[str, Any]) -> str:
        """The id of the queued graph. Raises ServerError where the server refuses it, naming each node."""
        try:
            answer = self._json("/prompt", {"prompt": graph})
        except urllib.error.HTTPError as error:
            with self._understood():
                raise ServerError(_refused(self.url, graph, error)) from error
        with self._understood():
            if answer.get("node_errors"):
                raise ServerError("\n".join(_problems(graph, answer["node_errors"])))
            return str(answer["prompt_id"])

    def before(self, prompt: str) -> int | None:
        """How many graphs run before it; 0 while it runs, None where it is no longer queued."""
        queued = self._json("/queue")
        with self._understood():
            if any(entry[1] == prompt for entry in queued["queue_running"]):
                return 0
            waiting = [entry[1] for entry in sorted(queued["queue_pending"])]
            return len(queued["queue_running"]) + waiting.index(prompt) if prompt in waiting else None

    def ended(self, prompt: str) -> Mapping[str, Any] | None:
        """What the history says of it; None until it has ended."""
        found: Mapping[str, Any] = self._json(f"/history/{prompt}")
        with self._understood():
            return found.get(prompt)

    def follow(self, prompt: str, said: Callable[[str], None], every: float = 1.0) -> Mapping[str, Any]:
        """The outputs of a queued graph, node id -> what the node gave, once it has ended.

        said: told in words where it is, each time that changes. Raises ServerError for one that fails or vanishes.
        """
        last = ""
        while True:
            ended = self.ended(prompt)
            if ended is not None:
                with self._understood():
                    return _outputs(ended)
            place = self.before(prompt)
            if place is None and self.ended(prompt) is None:
                raise ForgottenError(
                    f"{self.url}: the graph is no longer queued and has no history: it was cancelled, or the server "
                    "started again"
                )
            now = "running" if not place else f"queued, {place} before it"
            if now != last:
                said(now)
            last = now
            time.sleep(every)

    def cancel(self, prompt: str) -> None:
        """Take it out of the queue, or stop it."""
        self._json("/queue", {"delete": [prompt]})
        self._json("/interrupt", {"prompt_id": prompt})

    def fetch(self, outputs: Mapping[str, Any], folder: Path) -> Iterator[Path]:
        """Every file that was saved, written into the folder under its own name; each appears whole or not at all.

        Of files that have one name in several subfolders of the server, the second gets -2 behind it, and so on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        written: set[Path] = set()
        with self._understood():
            saved = list(_saved(outputs))
        for entry in saved:
            query = urllib.parse.urlencode({key: entry.get(key, "") for key in ("filename", "subfolder", "type")})
            own = folder / Path(entry["filename"]).name
            names = chain([own], (own.with_stem(f"{own.stem}-{number}") for number in count(2)))
            path = next(path for path in names if path not in written)
            written.add(path)
            with unfinished(path) as partial, self._open(f"/view?{query}") as answer, partial.open("wb") as file:
                while piece := answer.read(1 << 20):
                    file.write(piece)
            yield path

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._open(path, body) as answer:
            text = answer.read(MAX_ANSWER + 1)
        try:
            if len(text) > MAX_ANSWER:
                raise ValueError(f"more than {MAX_ANSWER} bytes")
            return json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self.url}{path} answers no JSON: is this a ComfyUI server?") from error

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """While an answer is looked into: one that is JSON of another shape becomes an error in words."""
        try:
            yield
        except (LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} answers something else: is this a ComfyUI server? ({error!r})") from error

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            if not self.url.startswith(("http://", "https://")):
                raise ValueError("it does not begin with http:// or https://")
            request = urllib.request.Request(self.url.rstrip("/") + path, data, JSON_BODY)  # noqa: S310 - as above
            return urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310
        except urllib.error.HTTPError as error:
            if path == "/prompt":
                raise
            raise ServerError(f"{self.url}{path}: {error.code} {error.reason}: is this a ComfyUI server?") from error
        except (OSError, HTTPException, ValueError) as error:
            why = getattr(error, "reason", error)
            raise UnreachableError(
                f"{self.url} cannot be reached ({why}): start ComfyUI (in a checkout: python dev.py host), or give its "
                "address as --server http://HOST:PORT"
            ) from error


def _refused(url: str, graph: Mapping[str, Any], error: urllib.error.HTTPError) -> str:
    try:
        told = json.loads(error.read())
    except ValueError:
        return f"{url}/prompt: {error.code} {error.reason}: is this a ComfyUI server?"
    what = told.get("error", {})
    if problems := list(_problems(graph, told.get("node_errors") or {})):
        return "\n".join(problems)
    said = f"the server refuses the graph: {what.get('message', told)} {what.get('details', '')}".strip()
    if what.get("type") in MISSING_NODE:
        said += ": install the nodes that it names on the server, or update them"
    return said


def _problems(graph: Mapping[str, Any], errors: Mapping[str, Any]) -> Iterator[str]:
    for node, told in errors.items():
        for problem in told["errors"]:
            said = f"{_named(graph, node)}: {problem['message']}: {problem.get('details', '')}".removesuffix(": ")
            extra = problem.get("extra_info") or {}
            if problem.get("type") == MISSING_FILE:
                said = (
                    f"{_named(graph, node)}: {extra.get('input_name', 'input')}={extra.get('received_value')!r} is not "
                    "on the server: put the file into its models folder, or name one that it has"
                )
            yield said


def _named(graph: Mapping[str, Any], node: str) -> str:
    found = graph.get(node, {})
    title = found.get("_meta", {}).get("title") or found.get("class_type", "node")
    return f"node {node} ({title})"


def _outputs(ended: Mapping[str, Any]) -> Mapping[str, Any]:
    status = ended.get("status") or {}
    if status.get("status_str") == "error":
        for kind, data in status.get("messages", ()):
            if kind == "execution_error":
                said = str(data.get("exception_message", "")).strip()
                raise ServerError(f"node {data.get('node_id')} ({data.get('node_type')}) failed: {said}")
            if kind == "execution_interrupted":
                raise ServerError(f"the graph was stopped at node {data.get('node_id')} ({data.get('node_type')})")
        raise ServerError("the graph failed, and the server does not say why: see its own log")
    outputs: Mapping[str, Any] = ended["outputs"]
    return outputs


def _saved(outputs: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    """Files in the server's output folder; previews are left there."""
    for given in outputs.values():
        for entry in (entry for key in LISTS for entry in given.get(key) or () if entry.get("type") == "output"):
            name = entry["filename"]
            if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name) or len(name) > 200:
                raise ServerError(
                    f"the server names a file {str(name)[:100]!r}, which is no name of a file in a folder"
                )
            yield entry
