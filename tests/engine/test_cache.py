"""Feature caches: which steps are skipped, what is added there, and that nothing leaks from one pass to another."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightx2v.cache import magcache, teacache
from lightx2v.cache.figures import Figures, Polynomial
from lightx2v.cache.lookup import published
from lightx2v.cache.walk import CacheReport, FeatureCache
from lightx2v.config import Cache, Sampling
from lightx2v.diffuse import Hooks, Model, Start
from lightx2v.models import specs
from lightx2v.models.wan.transformer import WanTransformer
from tiny_cache import CPU, EVEN, T2V, Seen, Walked, part, run, wan


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return wan()


# Which steps are skipped ---------------------------------------------------------------------------------------------


def test_teacache_adds_up_changes_until_the_threshold() -> None:
    """By hand: x = .1 .2 .1 .4 .1 .1 .1, P(x) = 2 x, threshold .5; steps 0 and 7 are computed.

    Step 1: .2 skip; 2: .6 compute; 3: .2 skip; 4: 1.0 compute; 5: .2 skip; 6: .4 skip.
    """
    changed = [0.1, 0.2, 0.1, 0.4, 0.1, 0.1, 0.1]
    double = Polynomial((2.0, 0.0))
    assert teacache.skipped_steps(changed, double, 0.5) == {1, 3, 5, 6}
    # The first 5 of 8 computed, the last one not spared: 5: .2 skip; 6: .4 skip; 7: .6 compute.
    assert teacache.skipped_steps(changed, double, 0.5, use_ret_steps=True) == {5, 6}
    assert teacache.skipped_steps(changed, double, 0.7, use_ret_steps=True) == {5, 6, 7}
    # A request that starts at step 3 has nothing to add there.
    assert teacache.skipped_steps(changed, double, 0.5, first=3) == {5, 6}


def test_a_negative_fit_skips_nothing_at_threshold_zero() -> None:
    falling = Polynomial((-1.0, 0.0))
    assert teacache.skipped_steps([0.1] * 9, falling, 0.0) == frozenset()
    assert len(teacache.skipped_steps([0.1] * 9, falling, 0.01)) == 8


def test_changes_are_relative_to_the_step_before() -> None:
    signal = torch.tensor([[1.0, -1.0], [2.0, -2.0], [2.0, -1.0]])
    assert teacache.changes(signal) == pytest.approx([1.0, 0.25])


def test_a_polynomial_is_proportional_beyond_what_was_measured() -> None:
    square = Polynomial((1.0, 0.0, 0.5), measured=(0.1, 0.2))
    assert square(0.1) == pytest.approx(0.51) and square(0.15) == pytest.approx(0.5225)
    assert square(0.05) == pytest.approx(0.255) and square(0.4) == pytest.approx(1.08)
    assert Polynomial((1.0, 0.0, 0.5))(0.0) == 0.5


def test_magcache_adds_up_the_drift_of_the_magnitude() -> None:
    """By hand: ratios .9 from step 1 on, threshold .3, 2 of 10 steps kept.

    Step 2: |1 - .9| = .1 skip; 3: + .19 = .29 skip; 4: + .271 compute; 5, 6 skip; 7 compute; 8, 9 skip.
    """
    ratios = (1.0, *[0.9] * 9)
    assert magcache.skipped_steps(ratios, 0.3) == {2, 3, 5, 6, 8, 9}
    assert magcache.skipped_steps(ratios, 0.3, max_skips=1) == {2, 4, 6, 8}
    assert magcache.skipped_steps(ratios, 0.3, retention_ratio=0.5) == {5, 6, 8, 9}
    assert magcache.skipped_steps(ratios, 0.3, first=5) == {6, 7, 9}
    assert magcache.skipped_steps(ratios, 0.3, retention_ratio=0) == {1, 2, 4, 5, 7, 8}, "the first is computed"
    assert magcache.skipped_steps(ratios, 0.0) == frozenset()


def test_ratios_of_another_number_of_steps_are_the_nearest() -> None:
    ratios = tuple(float(step) for step in range(50))
    assert magcache.nearest(ratios, 50) == ratios
    assert magcache.nearest(ratios, 8) == (0, 7, 14, 21, 28, 35, 42, 49)
    assert magcache.nearest((1.0, 2.0, 3.0), 5) == (1, 1, 2, 3, 3) or magcache.nearest((1.0, 2.0, 3.0), 5)[::4] == (
        1,
        3,
    )
    assert magcache.nearest(ratios, 1) == (49,)


def test_published_ratios_skip_half_of_50_steps() -> None:
    """Wan2.1 T2V 1.3B at LightX2V's settings, K 4 and 0.12: the two branches of one table, which are near."""
    figures = published()["wan2.1_t2v_1.3b"]
    skipped = [magcache.skipped_steps(figures.ratios(uncond), 0.12, max_skips=4) for uncond in (False, True)]
    assert all(min(steps) == 10 and 25 <= len(steps) <= 32 for steps in skipped)
    assert 49 not in skipped[0], "the last ratio is 0.818"


def test_published_figures_are_whole() -> None:
    found = published()
    assert set(found) == {
        "hunyuan1.5_480p_i2v",
        "wan2.1_t2v_1.3b",
        "wan2.1_t2v_14b",
        "wan2.1_i2v_14b_480p",
        "wan2.1_i2v_14b_720p",
        "wan2.2_ti2v_5b",
    }
    lengths = {name: (len(f.tea), len(f.tea_projected), len(f.mag), len(f.mag_uncond)) for name, f in found.items()}
    assert lengths["wan2.1_t2v_1.3b"] == (5, 5, 50, 50) and lengths["wan2.1_i2v_14b_480p"] == (5, 5, 40, 40)
    assert lengths["wan2.2_ti2v_5b"] == (6, 0, 0, 0)
    assert lengths["hunyuan1.5_480p_i2v"] == (0, 0, 50, 50)
    # Sums of the published tables: one wrong digit shows.
    small, big = found["wan2.1_t2v_1.3b"], found["wan2.1_i2v_14b_480p"]
    assert (sum(small.mag), sum(small.mag_uncond)) == pytest.approx((48.98687, 49.00448), abs=1e-9)
    assert (sum(big.mag), sum(big.mag_uncond)) == pytest.approx((38.99195, 38.99595), abs=1e-9)
    hunyuan = found["hunyuan1.5_480p_i2v"]
    assert (sum(hunyuan.mag), sum(hunyuan.mag_uncond)) == pytest.approx((49.36323, 49.37886), abs=1e-9)


# What is added on a skipped step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["teacache", "magcache"])
def test_threshold_zero_is_bit_equal_to_off(transformer: nn.Module, method: str) -> None:
    cached = run(transformer, FeatureCache(Cache(method, 0.0), (EVEN,)))
    assert torch.equal(cached, run(transformer, None))
    assert not torch.equal(cached, run(transformer, FeatureCache(Cache(method, 0.5), (EVEN,))))


def test_a_skipped_step_adds_what_the_last_computed_one_added(transformer: nn.Module) -> None:
    """P = .04 a step, threshold .1: steps 1, 2 skipped, 3 computed, 4, 5 skipped, ...; 9 is the last."""
    reports: list[CacheReport] = []
    walked = Walked()
    with Seen(transformer) as seen:
        run(transformer, FeatureCache(Cache("teacache", 0.1), (EVEN,), reports.append), run=walked)
    (report,) = reports
    assert report.skipped == {"cond": (1, 2, 4, 5, 7, 8), "uncond": (1, 2, 4, 5, 7, 8)}
    assert report.saved == 0.6 and walked.passes == 8 and report.passes == 20
    assert report.describe() == "teacache: skips steps 2-3, 5-6, 8-9 of 10; 60% of the passes saved"
    added = [out - tokens for out, tokens in zip(seen.outputs, seen.inputs, strict=True)]
    cond, uncond = added[::2], added[1::2]
    for branch in (cond, uncond):
        for skipped, computed in ((1, 0), (2, 0), (4, 3), (5, 3), (7, 6), (8, 6)):
            torch.testing.assert_close(branch[skipped], branch[computed], rtol=0, atol=1e-5)
        assert (branch[3] - branch[0]).abs().max() > 1e-2
    assert (cond[1] - uncond[1]).abs().max() > 1e-2, "each branch has its own"


def test_branches_skip_on_their_own_with_magcache(transformer: nn.Module) -> None:
    reports: list[CacheReport] = []
    walked = Walked()
    run(transformer, FeatureCache(Cache("magcache", 0.15), (EVEN,), reports.append), run=walked)
    skipped = reports[0].skipped
    # Drift a step: cond .02, .0396, .0588 (sum .118), .0776 (too much); uncond .1, .19 (too much).
    assert skipped == {"cond": (2, 3, 4, 6, 7, 8), "uncond": (2, 4, 6, 8)}
    assert walked.passes == 20 - 10
    assert "cond 3-5, 7-9; uncond 3, 5, 7, 9 of 10; 50%" in reports[0].describe()


def test_a_report_of_nothing_skipped_says_so(transformer: nn.Module) -> None:
    reports: list[CacheReport] = []
    run(transformer, FeatureCache(Cache("teacache", 0.0), (EVEN,), reports.append))
    assert reports[0].describe() == "teacache: skips no step of 10"


def test_a_checkpoints_usual_threshold_is_taken_where_none_is_given(transformer: nn.Module) -> None:
    reports: list[CacheReport] = []
    careful = replace(EVEN, usual={"teacache": 0.05})
    for cache in (Cache("teacache"), Cache("teacache", 0.1)):
        run(transformer, FeatureCache(cache, (careful,), reports.append))
    assert [report.skipped["cond"] for report in reports] == [(1, 3, 5, 7), (1, 2, 4, 5, 7, 8)]


def test_without_guidance_only_one_branch_is_counted(transformer: nn.Module) -> None:
    reports: list[CacheReport] = []
    cache = FeatureCache(Cache("teacache", 0.1), (EVEN,), reports.append)
    run(transformer, cache, part(cfg_scale=1.0))
    assert reports[0].passes == 10 and set(reports[0].skipped) == {"cond"}


# Nothing leaks --------------------------------------------------------------------------------------------------------


def test_requests_share_nothing(transformer: nn.Module) -> None:
    cache = FeatureCache(Cache("teacache", 0.1), (EVEN,))
    alone = run(transformer, FeatureCache(Cache("teacache", 0.1), (EVEN,)), part(seed=8))
    run(transformer, cache)
    assert torch.equal(run(transformer, cache, part(seed=8)), alone)


class Cancelled(Exception):
    pass


def test_a_cancelled_request_leaves_nothing(transformer: nn.Module) -> None:
    cache, blocks = FeatureCache(Cache("teacache", 0.1), (EVEN,)), []
    expected = run(transformer, cache)

    def cancel() -> None:
        blocks.append(1)
        if len(blocks) == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(transformer, cache, hooks=Hooks(on_block=cancel))
    # 2 blocks, 2 branches: 4 in step 0, none in steps 1 and 2, the third of step 3 never ran.
    assert len(blocks) == 7
    assert torch.equal(run(transformer, cache), expected)


def test_experts_have_plans_and_residuals_of_their_own(transformer: nn.Module) -> None:
    """Low starts with a computed step and equals a sampler of its own that starts there."""
    torch.manual_seed(5)
    other = WanTransformer(transformer.config, transformer.blocks[0]._kernels).eval().requires_grad_(False)
    reports: list[CacheReport] = []
    fast = Figures("fast", tea=(0.09,))
    cache = FeatureCache(Cache("teacache", 0.1), (EVEN, fast), reports.append)
    model = Model(T2V, CPU, lambda: transformer, lambda: other)
    together = run(transformer, cache, part(boundary_step=4), model=model)
    assert [(report.expert, report.skipped["cond"]) for report in reports] == [("high", (1, 2)), ("low", (5, 7))]
    half = run(transformer, cache, part(boundary_step=4, end_step=4), model=model)
    rest = run(other, cache, part(boundary_step=4, start_step=4, add_noise=False), start=Start(half), model=model)
    torch.testing.assert_close(together, rest, rtol=1e-4, atol=1e-4)
    assert [report.expert for report in reports[2:]] == ["high", "low"], "who has no step is not asked"


def test_the_low_expert_is_not_brought_before_its_turn(transformer: nn.Module) -> None:
    calls: list[str] = []

    def bring(name: str) -> nn.Module:
        calls.append(name)
        return transformer

    model = Model(T2V, CPU, lambda: bring("high"), lambda: bring("low"))
    run(transformer, FeatureCache(Cache("teacache", 0.1), (EVEN, EVEN)), part(boundary_step=4), model=model)
    assert calls == sorted(calls), "high, then low: never back"


def test_a_part_of_a_schedule_begins_with_a_computed_step(transformer: nn.Module) -> None:
    reports: list[CacheReport] = []
    walked = Walked()
    cache = FeatureCache(Cache("teacache", 0.1), (EVEN,), reports.append)
    run(transformer, cache, part(start_step=4, end_step=8), start=Start(torch.ones(1, 16, 2, 4, 6)), run=walked)
    assert reports[0].skipped["cond"] == (5, 6) and reports[0].passes == 8 and walked.passes == 4


def test_kept_regions_stay_with_a_cache(transformer: nn.Module) -> None:
    clean = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 2, 4, 6)
    mask[:, :, 0] = 0
    out = run(transformer, FeatureCache(Cache("teacache", 0.1), (EVEN,)), start=Start(clean, mask))
    torch.testing.assert_close(out[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    assert (out[:, :, 1] - clean[:, :, 1]).abs().max() > 0.1


def test_kept_frames_of_ti2v_work_with_a_cache() -> None:
    """There the timestep is one a frame; the plan goes by the frames that are made."""
    spec = next(spec for spec in specs() if spec.name == "wan2.2_ti2v")
    network, reports = wan(48), []
    clean = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    cache = FeatureCache(Cache("teacache", 0.1), (EVEN,), reports.append)
    out = run(network, cache, start=Start(clean, mask), model=Model(spec, CPU, lambda: network))
    assert reports[0].saved == 0.6
    torch.testing.assert_close(out[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sampling", [part(steps=8), Sampling(scheduler="distilled", cfg_scale=1.0)], ids=["8 steps", "distilled"]
)
def test_few_steps_turn_a_cache_off_and_say_so(
    transformer: nn.Module, sampling: Sampling, caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[CacheReport] = []
    with caplog.at_level(logging.INFO, "lightx2v.cache.walk"):
        out = run(transformer, FeatureCache(Cache("teacache", 5.0), (EVEN,), reports.append), sampling)
    assert torch.equal(out, run(transformer, None, sampling))
    assert reports[0].saved == 0 and reports[0].why_off.endswith("steps; caches pay from 9 on")
    assert "teacache: off: " in caplog.text


@pytest.mark.parametrize("steps", [9, 20, 50])
def test_other_step_counts_than_measured(transformer: nn.Module, steps: int) -> None:
    for method in ("teacache", "magcache"):
        reports: list[CacheReport] = []
        run(transformer, FeatureCache(Cache(method, 0.1), (EVEN,), reports.append), part(steps=steps))
        skipped = reports[0].skipped["cond"]
        assert 0 < len(skipped) < steps and skipped[0] > 0 and max(skipped) < steps
