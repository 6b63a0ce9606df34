import pytest

from lightx2v.schedules import Schedule, listed, simple, wan


def test_distilled_levels_are_the_published_ones() -> None:
    schedule = listed([1000, 750, 500, 250], shift=5.0)
    assert schedule.sigmas == pytest.approx((1.0, 0.9375, 0.8333333, 0.625, 0.0), abs=1e-7)
    assert schedule.timesteps == pytest.approx((1000.0, 937.5, 833.3333, 625.0), abs=1e-4)


def test_four_simple_steps_are_the_distilled_levels() -> None:
    assert simple(4, 5.0) == listed([1000, 750, 500, 250], 5.0)


def test_wan_levels() -> None:
    """First levels of Wan2.1 at 50 steps, shift 5, by hand: s = 0.999 - 0.01998 i, then 5s / (1 + 4s)."""
    schedule = wan(50, 5.0)
    for i in (0, 1, 49):
        s = 0.999 - 0.01998 * i
        assert schedule.sigmas[i] == pytest.approx(5 * s / (1 + 4 * s), abs=1e-6)
    assert schedule.timesteps[:2] == (999.0, 995.0)
    assert schedule.sigmas[-1] == 0.0


def test_shift_one_changes_nothing() -> None:
    assert simple(10, 1.0).sigmas == pytest.approx([1 - i / 10 for i in range(11)], abs=1e-6)


def test_parts_join_up() -> None:
    full = simple(6, 5.0)
    first, second = full.between(0, 3), full.between(3, 10)
    assert first.sigmas[-1] == second.sigmas[0]
    assert first.timesteps + second.timesteps == full.timesteps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: simple(0, 5.0), "steps must be at least 1, got 0"),
        (lambda: wan(1001, 5.0), "at most 1000, got 1001"),
        (lambda: simple(4, 0.0), "shift must be above 0"),
        (lambda: simple(4, float("nan")), "shift must be above 0"),
        (lambda: listed([], 5.0), r"got \[\]"),
        (lambda: listed([250, 500], 5.0), "must fall"),
        (lambda: listed([1001], 5.0), "at most 1000"),
        (lambda: simple(4, 5.0).between(2, 2), "steps 2 to 2 of 4 are empty"),
        (lambda: simple(4, 5.0).between(4, 9), "start_step 4 is past the last of 4"),
        (lambda: Schedule((1.0, 0.0), ()), "one timestep fewer"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
