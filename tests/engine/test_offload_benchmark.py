"""The benchmark of offload: what matters most first, and no speed for a wrong result."""

import json

import pytest

from benchmarks import offload
from lightx2v.bench.subjects import subject

COMMAND = ["--device", "cpu", "--model", "demo", "--budget", "0.62", "--waiting-blocks", "2"]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "subject", lambda name: subject(name).toy())


def measured(capsys: pytest.CaptureFixture[str], *more: str, status: int = 0) -> dict:
    assert offload.main([*COMMAND, *more]) == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_case_passes_its_gate(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--seconds", "600", "--weights", "bf16")
    rows = found["bf16"]["rows"]
    assert [row["gate"] for row in rows] == ["passed"] * 8 and all(row["ms"] > 0 for row in rows)
    assert [row["resident"] for row in rows[3:]] == [0, 0, 0, 1, 2] and len(found["waiting"]) == 6


def test_what_there_is_no_time_for_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--seconds", "0", "--weights", "fp8")
    assert [row["gate"] for row in found["fp8"]["rows"]] == ["passed", *[offload.LATE] * 7]
    assert {row["gate"] for row in found["waiting"]} == {offload.LATE}


def test_a_wrong_result_has_no_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda self, run, following: lambda blocks, tokens, args: tokens  # noqa: E731
    monkeypatch.setattr(offload.BlockStream, "around", wrong)
    rows = measured(capsys, "--seconds", "600", "--weights", "bf16", status=1)["bf16"]["rows"]
    assert all(row["gate"].startswith("wrong") and "ms" not in row for row in rows[1:])
