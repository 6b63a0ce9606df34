"""How the convolutions are cut: every way gives the same numbers, and what was measured is read and written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where triton.jit decorates

from closeness import assert_close
from lightx2v_kernels.conv3d.reference import conv3d as reference

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import conv
from benchmarks.frames import Layer
from lightx2v_kernels.conv3d import _tiles
from lightx2v_kernels.conv3d._tiles import Tiles
from lightx2v_kernels.conv3d._triton import conv3d

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # the interpreter multiplies no bfloat16
STRAIGHT = Tiles(128, 16, 8, 32, 3, 4, 8, straight=True)


@pytest.mark.parametrize("width", [1, 33, 63])
@pytest.mark.parametrize("how", [Tiles(32, 32, 0, 32, 2, 4, 4), Tiles(32, 16, 8, 16, 1, 4, 8), STRAIGHT])
@pytest.mark.parametrize("past", [False, True])
def test_a_rectangle_of_places_gives_the_same(how: Tiles, width: int, past: bool) -> None:
    if how.straight and PLACE.type != "cuda":
        pytest.skip("Gluon has no interpreter: test_hopper_compiles.py compiles it")
    torch.manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(PLACE, DTYPE).contiguous(memory_format=torch.channels_last_3d)

    x, before = rows(1, 24, 2, 9, width + 2), rows(1, 24, 2, 9, width + 2) if past else None
    weight, bias, beside = rows(24, 24, 3, 3, 3) * 0.04, torch.randn(24).to(PLACE, DTYPE), rows(1, 24, 2, 7, width)
    given = (x, before, weight, bias, beside)
    with torch.no_grad():
        wide = reference(*(None if a is None else a.double() for a in given), True)  # type: ignore[arg-type]
        assert_close("conv3d", conv3d(*given, True, how), wide, reference(*given, True))  # type: ignore[arg-type]


def test_the_rule_holds_where_nothing_was_measured() -> None:
    cpu = torch.device("cpu")
    assert _tiles.chosen(96, 96, (3, 3, 3), cpu) == _tiles.tiles(96, 96, (3, 3, 3), 232448)
    assert not _tiles.chosen(24, 24, (3, 3, 3), cpu).straight


def test_what_was_measured_is_taken_on_that_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"sm90": {"3x3x3 24->24": vars(STRAIGHT)}}))
    table = _tiles.measured(file)
    assert table == {"sm90": {"3x3x3 24->24": STRAIGHT}}
    monkeypatch.setattr(_tiles, "measured", lambda: table)
    monkeypatch.setattr(_tiles, "place", lambda device: f"sm{device.index}")
    monkeypatch.setattr(_tiles, "shared_memory", lambda device: 101376)
    fresh = _tiles.chosen.__wrapped__
    assert fresh(24, 24, (3, 3, 3), torch.device("cuda", 90)) == STRAIGHT
    assert not fresh(24, 24, (3, 3, 3), torch.device("cuda", 89)).straight
    assert not fresh(24, 48, (3, 3, 3), torch.device("cuda", 90)).straight


@pytest.mark.parametrize("change", [{"places": "128"}, {"straight": 1}, {"warps": -4}, {"colour": 3}])
def test_a_broken_table_is_named(change: dict, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"sm90": {"3x3x3 24->24": {**vars(STRAIGHT), **change}}}))
    with pytest.raises(ValueError, match=r"measured\.json: sm90, 3x3x3 24->24: .*expected places"):
        _tiles.measured(file)


def test_the_shipped_table_can_be_read() -> None:
    assert isinstance(_tiles.measured(), dict)


def test_winners_are_kept_beside_what_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, other = Tiles(128, 32, 0, 32, 5, 4), Tiles(128, 32, 0, 32, 5, 4, 8)
    monkeypatch.setattr(conv, "tilings", lambda case: [rule, other, STRAIGHT])
    cases = [conv.Case("light", Layer(c, c, (3, 3, 3), t, 480, 832)) for c, t in ((24, 4), (24, 2), (48, 4))]

    def row(case: conv.Case, how: Tiles, ms: float | None) -> dict:
        layer = case.layer
        size = f"{layer.frames}x{layer.height}x{layer.width}"
        return {"layer": case.label, "size": size, "way": conv.told(how), "ms": ms}

    rows = [row(cases[0], rule, 1.0), row(cases[0], other, 0.5), row(cases[0], STRAIGHT, 0.6)]
    rows += [row(cases[1], rule, 1.0), row(cases[1], other, 0.99), row(cases[1], STRAIGHT, 0.7)]
    rows += [row(cases[2], rule, 1.0), row(cases[2], other, 0.98), row(cases[2], STRAIGHT, None)]
    file = tmp_path / "measured.json"
    before = {"sm80": {"3x3x3 24->24": vars(other)}, "sm90": {"1x3x3 8->8": vars(other), "3x3x3 48->48": vars(other)}}
    file.write_text(json.dumps(before))
    cases.append(conv.Case("light", Layer(48, 48, (3, 3, 3), 2, 480, 832)))  # which no time was left for
    conv.keep(rows, cases, "sm90", file)
    table = _tiles.measured.__wrapped__(file)
    assert table["sm80"] == {"3x3x3 24->24": other}
    assert table["sm90"] == {"1x3x3 8->8": other, "3x3x3 24->24": STRAIGHT}


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "CASES", tuple(case for case in conv.CASES if case.layer.out in (3, 24)))
    out = tmp_path / "conv.json"
    assert conv.main(["--device", "cpu", "--only", "light", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert len(rows) == 4 and all(row["ms"] > 0 for row in rows)
