import json
from pathlib import Path
from xml.etree import ElementTree

from demo.grammar import held_out_pairs
from demo.tradeoff import BASELINE, Setting, compare, summed
from demo.tradeoff_plot import main as plot


def test_skipped_steps_are_counted_and_cost_something() -> None:
    skipping = Setting("Tea", 0.3)
    rows = [summed([made]) for made in compare(held_out_pairs(1)[0], 12, (skipping,))]
    assert [row["setting"] for row in rows] == [BASELINE.label, skipping.label]
    assert rows[0]["skipped"] == 0 and rows[0]["psnr_db"] == 100
    assert rows[1]["skipped"] > 0.2 and 25 < rows[1]["psnr_db"] < 60
    assert all(row["colour"] == 1 for row in rows)


def test_the_plot_has_a_point_for_every_setting(tmp_path: Path) -> None:
    rows = [
        {"setting": "50 steps", "threshold": 0.0, "skipped": 0.0, "psnr_db": 100.0},
        {"setting": "25 steps", "threshold": 0.0, "skipped": 0.5, "psnr_db": 40.0},
        {"setting": "TeaCache", "threshold": 0.3, "skipped": 0.7, "psnr_db": 35.0},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"steps": 50, "count": 1, "rows": rows}))
    plot([str(tmp_path / "results.json"), str(tmp_path / "plot.svg")])
    texts = [each.text for each in ElementTree.parse(tmp_path / "plot.svg").iter() if each.tag.endswith("text")]
    assert {"25", "0.3"} <= set(texts) and "0" not in texts
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
