"""The benchmark of offload: whole at toy size, what fails is said, and no speed for a wrong result."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offload, offload_parts
from benchmarks.offload_cases import WRONG

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
    pytest.importorskip("diffusers")
    found = parts(tmp_path / "offload.json")
    assert list(found) == list(offload.PARTS) and not [row for row in rows(found) if "failed" in row]
    gated = [row for row in rows(found) if "gate" in row]
    assert len(gated) == 11 and all(row["gate"] == "passed" and row["ms"] > 0 for row in gated)
    assert found["diffusers"]["error"] < 1e-4 and found["diffusers"]["ms"] > 0
    assert "2 blocks are read from the file" in found["ram"]["0.001 GB"]["plan"]
    assert "pass through" in found["pair"]["streamed"]["plan"] and len(found["pair"]["streamed"]["switch_s"]) == 2


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
