"""How a server's GPU memory is read and summed up, with readings that are made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from host.server import Server
from host.vram import Vram, rests, summary, vram

MB = 10**6


class FakeNvml:
    """One GPU with 3000 MB used; 700 of them by process 41, whose memory is told or not."""

    def __init__(self, *, told: bool = True, broken: str = "") -> None:
        self.told, self.broken, self.asked = told, broken, []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> int:
        self.asked.append(name)
        if name == "nvmlDeviceGetMemoryInfo":
            arguments[1]._obj.used = 3000 * MB
        if name == "nvmlDeviceGetComputeRunningProcesses_v3":
            arguments[1]._obj.value = 2
            for place, (pid, used) in enumerate(((7, 100 * MB), (41, 700 * MB))):
                arguments[2][place].pid, arguments[2][place].used = pid, used if self.told else 2**64 - 1
        return 9 if name == self.broken else 0


@dataclass(frozen=True)
class FakeServer(Server):
    """Says the same of its memory each time, and keeps what it is sent."""

    kind: str = "cuda"
    sent: list[tuple[str, Any]] = field(default_factory=list)

    def get(self, path: str) -> Any:
        self.sent.append(("get", path))
        memory = {"vram_total": 9000 * MB, "vram_free": 8000 * MB, "torch_vram_total": 500 * MB}
        device = {"name": self.kind, "type": self.kind, **memory, "torch_vram_free": 200 * MB}
        return {"/system_stats": {"devices": [device]}, "/queue": {"queue_running": [], "queue_pending": []}}[path]

    def post(self, path: str, body: Any) -> None:
        self.sent.append((path, body))


@pytest.fixture
def server(tmp_path: Path) -> FakeServer:
    (tmp_path / "log").write_text("Device: cpu\n", encoding="utf-8")
    return FakeServer("http://127.0.0.1:1", tmp_path, tmp_path / "log", pid=41)


@pytest.mark.parametrize(
    ("nvml", "whose", "used"),
    [
        (FakeNvml(), "the server's process, by NVML", 700),
        (FakeNvml(told=False), "all of the GPU, by NVML", 3000),
        (FakeNvml(broken="nvmlInit_v2"), "all of the GPU but PyTorch's cache, by ComfyUI's count", 1000),
    ],
    ids=["process", "gpu", "comfyui"],
)
def test_whose_memory_is_read_is_said(server: FakeServer, nvml: FakeNvml, whose: str, used: int) -> None:
    gpu = vram(server, nvml)
    assert gpu.of == whose
    assert gpu.read() == {"used": used * MB, "reserved": 500 * MB, "active": 300 * MB}
    assert nvml.asked[0] == "nvmlInit_v2"


def test_a_server_on_the_cpu_is_refused_with_its_log(server: FakeServer) -> None:
    with pytest.raises(RuntimeError, match=r"no GPU here[\s\S]+Device: cpu"):
        vram(FakeServer(server.url, server.base, server.log_path, kind="cpu"), FakeNvml())


def test_readings_of_runs_are_summed_up() -> None:
    used = [900, 1000, 1010, 990, 1030, 1000]
    told = summary([{"used": each * MB, "reserved": 64 * MB} for each in used])
    assert told["used"]["each_mb"] == used and told["used"]["second_mb"] == 1000
    assert told["used"]["growth"] == 0.0 and told["used"]["growth_at_most"] == 0.03
    assert told["used"]["apart_mb"] == 40 and told["reserved"]["apart_mb"] == 0


def test_it_rests_frees_runs_once_more_and_frees_again(server: FakeServer) -> None:
    readings = iter([800, 450, 810, 455])

    def used() -> int:
        return next(readings) * MB

    found = rests(Vram("a test's", server, used), lambda: server.sent.append(("run", None)), rest_s=0)
    assert [each["used"] for each in found.values()] == [800, 450, 810, 455]
    assert list(found) == ["after_runs", "freed", "after_one_more", "freed_again"]
    everything = ("/free", {"unload_models": True, "free_memory": True})
    assert [sent for sent in server.sent if sent[0] != "get"] == [everything, ("run", None), everything]
