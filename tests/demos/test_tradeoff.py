from demo.grammar import held_out_pairs
from demo.tradeoff import BASELINE, Setting, compare, summed


def test_skipped_steps_are_counted_and_cost_something() -> None:
    skipping = Setting("Tea", 0.3)
    rows = [summed([made]) for made in compare(held_out_pairs(1)[0], 12, (skipping,))]
    assert [row["setting"] for row in rows] == [BASELINE.label, skipping.label]
    assert rows[0]["skipped"] == 0 and rows[0]["psnr_db"] == 100
    assert rows[1]["skipped"] > 0.2 and 25 < rows[1]["psnr_db"] < 60
    assert all(row["colour"] == 1 for row in rows)
