"""examples/queue_many_servers.py over servers that answer as ComfyUI does, one of which dies."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dev.environment import REPOSITORY
from lightx2v import comfyui
from stub_comfyui import StubComfyUI


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("queue_many_servers", REPOSITORY / "examples/queue_many_servers.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, example: ModuleType) -> Iterator[tuple[StubComfyUI, StubComfyUI]]:
    follow = comfyui.Server.follow
    monkeypatch.setattr(comfyui.Server, "follow", lambda self, prompt, said: follow(self, prompt, said, every=0.01))
    monkeypatch.setattr(example, "PAUSE", 0.02)
    stubs = StubComfyUI(), StubComfyUI()
    yield stubs
    for stub in stubs:
        stub.kill()


@pytest.fixture
def spread(example: ModuleType, pair: tuple[StubComfyUI, ...], tmp_path: Path) -> Callable[..., tuple[int, list[Any]]]:
    """Run the example on both stubs: its exit status, and its summary."""

    def run(*flags: str, names: tuple[str, ...] = ("a", "b", "c", "d")) -> tuple[int, list[Any]]:
        files = []
        for name in names:
            graph = {"1": {"class_type": "SaveVideo", "inputs": {"filename_prefix": name, "seed": 7, "steps": 4}}}
            files.append(tmp_path / f"{name}.api.json")
            files[-1].write_text(json.dumps(graph), encoding="utf-8")
        places = ["--servers", *(stub.url for stub in pair), "--output", str(tmp_path / "clips")]
        status = example.main([*places, *flags, "--", *map(str, files)])
        return status, json.loads((tmp_path / "clips/summary.json").read_text(encoding="utf-8"))

    return run


def all_made(summary: list[Any]) -> bool:
    return all(job["made"] and len(job["files"]) == 1 and Path(job["files"][0]).exists() for job in summary)


def dying(stub: StubComfyUI, path: str, count: int = 1) -> None:
    """It dies when such a path is asked for the count-th time."""
    asked: list[str] = []

    def on_ask(what: str) -> None:
        if what.startswith(path):
            asked.append(what)
            if len(asked) == count:
                stub.kill()

    stub.on_ask = on_ask


def test_both_work_and_every_seed_is_made_once(spread: Any, pair: tuple[StubComfyUI, ...], tmp_path: Path) -> None:
    one, two = pair
    both = threading.Barrier(2, timeout=20)  # neither ends its first job before the other has begun one
    for stub in pair:
        first = iter([True])
        stub.on_ask = lambda path, first=first: both.wait() if path == "/prompt" and next(first, False) else None
    status, summary = spread("--seeds", "1", "2", names=("a", "b"))
    assert status == 0 and all_made(summary)
    assert [job["job"] for job in summary] == ["a-1", "a-2", "b-1", "b-2"]
    assert sorted(one.made + two.made) == ["a-1", "a-2", "b-1", "b-2"] and one.made and two.made
    assert (tmp_path / "clips/b-2/b.mp4").read_bytes() == b"b.mp4"
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {"a-1", "a-2", "b-1", "b-2", "summary.json"}


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/view"])
def test_a_killed_server_loses_nothing(spread: Any, pair: tuple[StubComfyUI, ...], path: str) -> None:
    """Killed while it is given a job, while it makes one, and while its file is fetched."""
    one, two = pair
    one.polls = 3
    dying(one, path)
    waited = threading.Event()  # the other server takes nothing before the first has died
    two.on_ask = lambda asked: None if waited.is_set() or asked != "/prompt" else until(lambda: one.dead, waited)
    status, summary = spread("--patience", "0.1")
    assert status == 0 and all_made(summary) and {job["server"] for job in summary} == {two.url}


def until(condition: Callable[[], bool], done: threading.Event) -> None:
    for _ in range(2000):
        if condition():
            break
        done.wait(0.01)
    done.set()


def test_a_server_that_comes_back_is_used_again(
    spread: Any, pair: tuple[StubComfyUI, ...], example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "TRIES", 1)
    one, two = pair
    two.kill()
    one.polls = 3
    dying(one, "/queue")
    threading.Thread(target=lambda: (until(lambda: one.dead, threading.Event()), one.start()), daemon=True).start()
    status, summary = spread("--patience", "20")
    assert status == 0 and all_made(summary) and {job["server"] for job in summary} == {one.url}
    assert "p1" in one.cancelled  # what it was making when it died is not made twice


def test_a_server_that_starts_again_at_once_makes_what_it_forgot(spread: Any, pair: tuple[StubComfyUI, ...]) -> None:
    one, two = pair
    two.kill()
    one.polls, asked = 3, iter([True])
    one.on_ask = lambda path: one.forget() if path == "/queue" and next(asked, False) else None
    status, summary = spread("--patience", "20")
    assert status == 0 and all_made(summary)


def test_what_one_server_refuses_another_makes(
    spread: Any, pair: tuple[StubComfyUI, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = pair
    one.refuse = lambda graph: "no such model"
    two.refuse = lambda graph: "no such node" if graph["1"]["inputs"]["filename_prefix"] == "b" else None
    status, summary = spread()
    assert status == 1
    assert [job["made"] for job in summary] == [True, False, True, True]
    assert set(summary[1]["tried"]) == {one.url, two.url} and "no such node" in summary[1]["tried"][two.url]
    said = capsys.readouterr().out
    assert "b: NOT MADE" in said and "3 of 4 made" in said


def test_no_server_left_is_said(spread: Any, pair: tuple[StubComfyUI, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for stub in pair:
        stub.kill()
    status, summary = spread("--patience", "0.05")
    assert status == 1 and not any(job["made"] for job in summary)
    assert "a: NOT MADE: no server was left to make it" in capsys.readouterr().out


def test_a_job_that_kills_servers_ends(spread: Any, pair: tuple[StubComfyUI, ...], example: ModuleType) -> None:
    """Started again each time, as supervisors do."""
    for stub in pair:

        def on_ask(path: str, stub: StubComfyUI = stub) -> None:
            if path.startswith("/history"):
                stub.kill()
                threading.Timer(0.1, stub.start).start()

        stub.polls, stub.on_ask = 3, on_ask
    status, summary = spread("--patience", "20", names=("a",))
    assert status == 1 and "servers died while they made it" in " ".join(summary[0]["tried"].values())


def test_files_of_one_name_are_both_kept(pair: tuple[StubComfyUI, ...], tmp_path: Path) -> None:
    saved = [{"filename": "clip.mp4", "subfolder": sub, "type": "output"} for sub in "xyz"]
    written = list(comfyui.Server(pair[0].url).fetch({"1": {"images": saved}}, tmp_path))
    assert [path.name for path in written] == ["clip.mp4", "clip-2.mp4", "clip-3.mp4"]


def test_names_are_their_own_and_seeds_replace_numbers_only(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "wan.api.json"
    inputs = {"noise_seed": 1, "seed": ["2", 0], "steps": 4}
    path.write_text(json.dumps({"1": {"class_type": "Sampler", "inputs": inputs}}), encoding="utf-8")
    jobs = example.jobs_of([path, path], [5])
    assert [job.name for job in jobs] == ["wan-5", "wan-5-2"]
    assert jobs[0].graph["1"]["inputs"] == {"noise_seed": 5, "seed": ["2", 0], "steps": 4}
    assert [job.name for job in example.jobs_of([path, path], [])] == ["wan", "wan-2"]
