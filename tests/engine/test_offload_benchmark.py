"""The benchmark of offload: whole at toy size, what fails is said, and no speed for a wrong result."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index

from benchmarks import offload, offload_cases, offload_parts
from benchmarks.offload_cases import WRONG, capped, place

COMMAND = ["--tiny", "--device", "cpu", "--caps", "0", "8", "--ram-caps", "1"]


def parts(file: Path, *more: str, status: int = 0) -> dict[str, Any]:
    assert offload.main([*COMMAND, "--json", str(file), *more]) == status
    return json.loads(file.read_text())["parts"]


def rows(found: Any) -> list[dict[str, Any]]:
    """Every table of figures within a part."""
    if isinstance(found, list):
        return [row for each in found for row in rows(each)]
    if not isinstance(found, dict):
        return []
    return [found, *(row for each in found.values() for row in rows(each))]


def test_every_part_runs_and_passes_its_gate(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    found = parts(tmp_path / "offload.json")
    assert list(found) == list(offload.PARTS) and not [row for row in rows(found) if "failed" in row]
    gated = [row for row in rows(found) if "gate" in row]
    assert len(gated) == 21 and all(row["gate"] == "passed" and row["ms"] > 0 for row in gated)
    assert found["diffusers"]["error"] < 1e-4 and found["diffusers"]["ms"] > 0
    for scheme in ("bf16", "fp8"):
        steps = found["guidance"][f"{scheme}, 160x96, 5 frames"]
        assert steps["in turn"]["copied_gb"] == pytest.approx(2 * steps["shared"]["copied_gb"], rel=0.01)
        assert "once for both passes" in steps["shared"]["plan"] and "a pass)" in steps["in turn"]["plan"]
    assert "2 blocks are read from the file" in found["ram"]["0.001 GB"]["plan"]
    assert "pass through" in found["pair"]["streamed"]["plan"] and len(found["pair"]["streamed"]["switch_s"]) == 2


class Card:
    """What the benchmark asks of a GPU's memory; a cap without the GPU's number is refused, as PyTorch refuses it."""

    total_memory = 80 * 10**9

    def __init__(self) -> None:
        self.caps: list[float] = []

    def cap(self, share: float, device: Any = None) -> None:
        _get_device_index(device)
        self.caps.append(share * self.total_memory)

    def fakes(self) -> dict[str, Any]:
        told = dict.fromkeys(("memory_allocated", "max_memory_allocated", "max_memory_reserved"), lambda *_: 10**9)
        silent = dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *_: None)
        return {
            **told,
            **silent,
            "get_device_properties": lambda *_: self,
            "set_per_process_memory_fraction": self.cap,
            "current_device": lambda: 0,
        }


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    for name, fake in card.fakes().items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return card


def test_a_cap_names_its_gpu(card: Card) -> None:
    with pytest.raises(ValueError, match="specified index"), capped(torch.device("cuda"), 8e9):
        pass
    assert place("cuda") == torch.device("cuda", 0) and place("cuda:1").index == 1 and place("cpu").type == "cpu"
    with capped(place("cuda"), 8e9):
        assert card.caps == [8e9]
    assert card.caps == [8e9, 80e9]


def test_a_gpus_memory_is_told_in_every_part(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches that a CPU does not take, on tensors of the CPU."""
    cap, gpu = card.cap, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: cap(share, gpu))
    monkeypatch.setattr(offload_cases, "on_gpu", lambda device: True)
    monkeypatch.setattr(offload_parts, "on_gpu", lambda device: True)
    monkeypatch.setattr(offload_cases, "Marks", Ticks)
    monkeypatch.setattr(offload_parts, "Marks", Ticks)
    found = parts(tmp_path / "offload.json", "--only", "bf16", "fp8", "caps", "pair", "ram")
    assert not [row for row in rows(found) if "failed" in row]
    for row in (
        found["bf16"]["streamed"],
        found["caps"]["160x96"][1],
        found["pair"]["streamed"],
        found["ram"]["0.001 GB"],
    ):
        assert row["gate"] == "passed" and row["reserved_gb"] == 1 and "peak_gb" in row
    assert min(card.caps) < 1e9 and card.caps[-1] == 80e9


class Ticks(offload_cases.Marks):
    """By the host's clock."""

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def ms(self) -> list[float]:
        return [1000 * (second - first) for first, second in pairwise(self._marks)]


def test_what_there_is_no_time_for_or_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts(tmp_path / "a.json", "--seconds", "-1", "--only", "bf16", "pinning")
    assert all(part["failed"].startswith("left out") for part in found.values())
    monkeypatch.setattr(offload_parts, "measured", lambda *_: 1 / 0)
    found = parts(tmp_path / "b.json", "--only", "bf16", "diffusers", "pinning")
    assert found["bf16"]["failed"].startswith("ZeroDivisionError") and found["bf16"]["weights_gb"] > 0
    assert "has to run before" in found["diffusers"]["failed"] and "failed" not in found["pinning"]


def test_a_wrong_result_has_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda self, run, following: lambda blocks, tokens, args: tokens  # noqa: E731
    monkeypatch.setattr(offload_parts.BlockStream, "around", wrong)
    row = parts(tmp_path / "a.json", "--only", "bf16", status=1)["bf16"]["streamed"]
    assert row["gate"] == WRONG and "ms" not in row
