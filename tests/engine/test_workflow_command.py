"""`lightx2v workflow` against a server that answers as ComfyUI does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from lightx2v import comfyui
from lightx2v.__main__ import main
from lightx2v.comfyui import Server, read_graph
from stub_comfyui import handler

GRAPH = {
    "1": {"class_type": "LightX2VLoadModel", "inputs": {"model": "gone.safetensors"}, "_meta": {"title": "Load Model"}},
    "2": {"class_type": "SaveVideo", "inputs": {"video": ["1", 0]}},
}
SAVED = {"filename": "clip.mp4", "subfolder": "video", "type": "output"}
SUCCESS = {"status": {"status_str": "success", "completed": True, "messages": []}}


class Fake:
    """A ComfyUI that knows one prompt: refused: status and answer of /prompt. history: what it says once it ended."""

    def __init__(self) -> None:
        self.refused: tuple[int, Mapping[str, Any]] | None = None
        self.history: Mapping[str, Any] | None = {**SUCCESS, "outputs": {"2": {"images": [SAVED], "animated": [True]}}}
        self.queue: list[Mapping[str, Any]] = []  # answers of /queue, one a question; then it has ended
        self.asked: list[tuple[str, Any]] = []

    def answer(self, path: str, body: Any) -> tuple[int, bytes]:
        self.asked.append((path, body))
        where = urlparse(path)
        if where.path == "/prompt":
            status, told = self.refused or (200, {"prompt_id": "p1", "number": 1, "node_errors": {}})
            return status, json.dumps(told).encode()
        if where.path == "/history/p1":
            ended = not self.queue and self.history is not None
            return 200, json.dumps({"p1": self.history} if ended else {}).encode()
        if where.path == "/queue" and body is None:
            return 200, json.dumps(self.queue.pop(0) if self.queue else queued()).encode()
        if where.path in ("/queue", "/interrupt"):
            return 200, b""
        if where.path == "/view" and parse_qs(where.query)["filename"] == ["clip.mp4"]:
            return 200, b"video"
        return 404, b"not found"


NAMES = ("../clip.mp4", "/etc/clip.mp4", "..", "", "a\\clip.mp4", "C:clip.mp4", "a" * 300, 7, None, "a\0b")


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_server_names_no_file_outside_the_folder(
    fake: tuple[Fake, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: object
) -> None:
    state, url = fake
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    (tmp_path / "inside").mkdir()
    state.history = {**SUCCESS, "outputs": {"2": {"images": [{**SAVED, "filename": name}]}}}
    line = [str(tmp_path / "w.json"), "--server", url, "--output", str(tmp_path / "inside")]
    assert "which is no name of a file in a folder" in failed(capsys, *line)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inside", "w.json"]


@pytest.mark.parametrize(
    "answer", [[], 3, {"status": []}, {"status": {}, "outputs": 3}, {"outputs": {"1": 2}}, {"a": 1}]
)
def test_answers_of_another_shape(
    fake: tuple[Fake, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Any
) -> None:
    state, url = fake
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    state.history = answer
    said = failed(capsys, str(tmp_path / "w.json"), "--server", url)
    assert said.startswith(f"error: {url} answers something else: is this a ComfyUI server?")


def test_only_servers_are_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    assert "does not begin with http://" in failed(capsys, str(tmp_path / "w.json"), "--server", f"file://{tmp_path}")


def queued(running: tuple[str, ...] = (), pending: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "queue_running": [[index, name, {}] for index, name in enumerate(running)],
        "queue_pending": [[9 - index, name, {}] for index, name in reversed(list(enumerate(reversed(pending))))],
    }


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    state = Fake()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state.answer))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(comfyui.time, "sleep", lambda seconds: None)
    path = tmp_path / "wan.api.json"
    path.write_text(json.dumps(GRAPH), encoding="utf-8")
    return path


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["workflow", *arguments]) == 1
    return capsys.readouterr().err


def test_what_it_saves_is_fetched(
    fake: tuple[Fake, str], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, url = fake
    state.queue = [queued(("x",), ("y", "p1")), queued(("y",), ("p1",)), queued(("p1",)), queued(("p1",))]
    folder = tmp_path / "new" / "folder"
    assert main(["workflow", str(graph), "--server", f"{url}/", "--output", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(folder / "clip.mp4")] and (folder / "clip.mp4").read_bytes() == b"video"
    assert said.err.splitlines() == ["queued, 2 before it", "queued, 1 before it", "running"]
    assert [path.name for path in folder.iterdir()] == ["clip.mp4"], "nothing half-written stays"
    assert state.asked[0] == ("/prompt", {"prompt": GRAPH})
    assert main(["workflow", str(graph), "--server", url, "--output", str(folder), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_what_the_server_refuses_is_said_by_node(
    fake: tuple[Fake, str], graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, url = fake
    missing = {
        "type": "value_not_in_list",
        "message": "Value not in list",
        "details": "model: 'gone.safetensors' not in []",
        "extra_info": {"input_name": "model", "received_value": "gone.safetensors"},
    }
    other = {"type": "required_input_missing", "message": "Required input is missing", "details": "seed"}
    errors = {"1": {"errors": [missing, other], "class_type": "LightX2VLoadModel"}}
    failure = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation", "details": ""}
    state.refused = (400, {"error": failure, "node_errors": errors})
    said = failed(capsys, str(graph), "--server", url)
    assert "node 1 (Load Model): model='gone.safetensors' is not on the server: put the file into its models" in said
    assert "node 1 (Load Model): Required input is missing: seed" in said
    unknown = {"type": "invalid_prompt", "message": "Cannot execute because node Foo does not exist.", "details": "#1"}
    state.refused = (400, {"error": unknown, "node_errors": {}})
    assert "node Foo does not exist. #1: install the nodes" in failed(capsys, str(graph), "--server", url)
    state.refused = (500, {})
    assert "refuses the graph" in failed(capsys, str(graph), "--server", url)


def test_what_fails_while_it_runs_is_said(
    fake: tuple[Fake, str], graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, url = fake
    data = {"node_id": "1", "node_type": "LightX2VLoadModel", "exception_message": "not enough memory\n"}
    for kind, words in (
        ("execution_error", "node 1 (LightX2VLoadModel) failed: not enough memory"),
        ("execution_interrupted", "the graph was stopped at node 1 (LightX2VLoadModel)"),
        ("other", "the server does not say why"),
    ):
        state.history = {"status": {"status_str": "error", "messages": [[kind, data]]}, "outputs": {}}
        assert words in failed(capsys, str(graph), "--server", url)
    state.history = None
    assert "no longer queued and has no history" in failed(capsys, str(graph), "--server", url)
    state.history = {**SUCCESS, "outputs": {"2": {"images": [{**SAVED, "type": "temp"}]}}}
    assert "it ran and saved nothing: add a Save Video node" in failed(capsys, str(graph), "--server", url)
    state.history = {**SUCCESS, "outputs": {"2": {"images": [{**SAVED, "filename": "gone.mp4"}]}}}
    assert "404" in failed(capsys, str(graph), "--server", url)


def test_stopping_stops_the_server_too(
    fake: tuple[Fake, str], graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, url = fake
    state.queue = [queued(("p1",))] * 3

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comfyui.time, "sleep", stop)
    assert main(["workflow", str(graph), "--server", url]) == 130
    assert state.asked[-2:] == [("/queue", {"delete": ["p1"]}), ("/interrupt", {"prompt_id": "p1"})]
    assert "cancelled" in capsys.readouterr().err


def test_no_server_and_no_graph(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:9", "127.0.0.1:8188", "nonsense"):
        said = failed(capsys, str(graph), "--server", url)
        assert f"error: {url} cannot be reached" in said and "python dev.py host" in said
    page = tmp_path / "page.json"
    for text, words in (
        ('{"nodes": []}', "is a workflow of the page: give its .api.json"),
        ("[]", "is no workflow in API format"),
        ('{"1": {}}', "is no workflow in API format"),
        ("{", "is not JSON"),
    ):
        page.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            read_graph(page)
    with pytest.raises(ValueError, match="cannot be read"):
        read_graph(tmp_path / "gone.json")
    assert Server("http://x").url == "http://x"
