"""What is known of a checkpoint: published figures, measured ones and their files, and settings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightx2v.cache import magcache, teacache
from lightx2v.cache.calibration import Recorder
from lightx2v.cache.choice import choose, kept_bytes, save
from lightx2v.cache.figures import Polynomial, given
from lightx2v.cache.lookup import figures_for, figures_path
from lightx2v.config import Cache, Request, Sampling
from lightx2v.diffuse import Model
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.models import specs
from tiny_cache import CPU, EMPTY, EVEN, T2V, TEN, Seen, part, run, wan


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return wan()


# Which figures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, transformer: nn.Module) -> CheckpointInfo:
    return write(tmp_path / "own.v2.safetensors", transformer)


def write(path: Path, transformer: nn.Module) -> CheckpointInfo:
    save_file({name: value.contiguous() for name, value in transformer.state_dict().items()}, path)
    return identify(path)


def measured(transformer: nn.Module, sampling: Sampling = TEN, model: Model | None = None) -> Recorder:
    recorder = Recorder()
    plain = run(transformer, None, sampling, **({} if model is None else {"model": model}))
    recorded = run(transformer, recorder, sampling, **({} if model is None else {"model": model}))
    assert torch.equal(plain, recorded), "measuring changes nothing"
    return recorder


def test_a_checkpoint_that_nobody_measured_is_refused_with_what_to_do(checkpoint: CheckpointInfo) -> None:
    for method in ("teacache", "magcache"):
        with pytest.raises(ValueError, match=r"own\.v2\.safetensors: no cache figures are known.*lightx2v calibrate"):
            choose(Cache(method), [checkpoint])
    assert choose(Cache("none"), [checkpoint]) is None
    with pytest.raises(
        ValueError, match=r"figures='wan9' is neither a \.cache\.json nor one of hunyuan1\.5_480p_i2v, "
    ):
        choose(Cache("teacache", figures="wan9"), [checkpoint])
    with pytest.raises(ValueError, match=r"TI2V 5B, published: no MagCache ratios; measure them"):
        run(wan(), choose(Cache("magcache", figures="wan2.2_ti2v_5b"), [checkpoint]))
    with pytest.raises(ValueError, match=r"no TeaCache coefficients with use_ret_steps.*or without use_ret_steps"):
        run(wan(), choose(Cache("teacache", use_ret_steps=True, figures="wan2.2_ti2v_5b"), [checkpoint]))


def test_experts_have_no_published_figures(checkpoint: CheckpointInfo) -> None:
    with pytest.raises(ValueError, match=r"nobody publishes cache figures of Wan2\.2's experts"):
        figures_for(Cache("teacache"), [checkpoint, checkpoint])
    with pytest.raises(ValueError, match="of two experts each has its own"):
        figures_for(Cache("teacache", figures="wan2.1_t2v_14b"), [checkpoint, checkpoint])
    with pytest.raises(ValueError, match="each of two experts has its own coefficients"):
        choose(Cache("teacache"), [checkpoint, checkpoint], given=EVEN)


def named(name: str, variant: str, folder: str = "models") -> CheckpointInfo:
    spec = next(spec for spec in specs() if spec.name == variant)
    info = CheckpointInfo(Path("/nowhere", folder, name), None, spec, None, torch.bfloat16)  # type: ignore[arg-type]
    return replace(info, expert_hint="high" if "high_noise" in name else None)


def test_published_figures_are_found_by_variant_and_name() -> None:
    def found(info: CheckpointInfo) -> str:
        return figures_for(Cache("teacache"), [info])[0].name

    assert found(named("a.safetensors", "wan2.1_t2v_1.3b")) == "Wan2.1 T2V 1.3B, published"
    assert found(named("wan2.1_i2v_480p_14B_fp16.safetensors", "wan2.1_i2v_14b")).startswith("Wan2.1 I2V 14B 480P")
    in_folder = named("diffusion_pytorch_model.safetensors", "wan2.1_i2v_14b", "Wan2.1-I2V-14B-720P")
    assert found(in_folder).startswith("Wan2.1 I2V 14B 720P")
    with pytest.raises(ValueError, match=r"published as 480p and 720p.*set figures to wan2\.1_i2v_14b_480p or"):
        found(named("model.safetensors", "wan2.1_i2v_14b"))
    with pytest.raises(ValueError, match="nobody publishes"):
        found(named("wan2.2_t2v_high_noise_14B.safetensors", "wan2.1_t2v_14b"))


def test_figures_as_lightx2v_writes_them() -> None:
    assert given([], []) is None
    both = given([[1.0, 2.0], [3.0]], [[1.0, 0.9], [1.0, 0.8]])
    assert both is not None and both.polynomial(True).coefficients == (1.0, 2.0) and both.tea == (3.0,)
    assert both.ratios(True) == (1.0, 0.8)
    flat = given([1.0, 2.0], [1.0, 0.9])
    assert flat is not None and flat.tea == flat.tea_projected == (1.0, 2.0) and flat.ratios(True) == (1.0, 0.9)
    with pytest.raises(ValueError, match="give one list of numbers, or two"):
        given([[1.0], [2.0], [3.0]], [])
    with pytest.raises(ValueError, match="2 MagCache ratios of the conditional branch and 1"):
        given([], [[1.0, 0.9], [1.0]])


# Measuring ------------------------------------------------------------------------------------------------------------


def test_a_fit_finds_the_polynomial() -> None:
    known = Polynomial((300.0, -20.0, 3.0, 0.5, 0.01))
    points = [(x / 100, known(x / 100)) for x in range(1, 20)]
    assert teacache.fit(points) == pytest.approx(known.coefficients, rel=1e-6)
    with pytest.raises(ValueError, match="too few for a polynomial of degree 4"):
        teacache.fit(points[:5])


def test_magnitudes_are_measured_token_by_token() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    assert magcache.magnitude_ratio(before * torch.tensor([2.0, 2.0]), before) == pytest.approx(2.0)
    after = torch.stack([before[0, 0] * 0.5, before[0, 1] * 1.5])[None]
    assert magcache.magnitude_ratio(after, before) == pytest.approx(1.0)


def test_measured_figures_say_what_the_blocks_did(transformer: nn.Module) -> None:
    recorder = measured(transformer)
    figures = recorder.figures(5.0)
    with Seen(transformer) as seen:
        run(transformer, None)
    added = [out - tokens for out, tokens in zip(seen.outputs, seen.inputs, strict=True)]
    expected = [magcache.magnitude_ratio(after, before) for before, after in zip(added[::2], added[2::2], strict=False)]
    assert figures.mag == pytest.approx((1.0, *expected), abs=1e-5)
    assert figures.steps == len(figures.mag_uncond) == 10 and recorder.requests == 1
    assert figures.mag_uncond != figures.mag
    changes = [
        ((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(seen.outputs, seen.outputs[2:], strict=False)
    ]
    mean = [(cond + uncond) / 2 for cond, uncond in zip(changes[::2], changes[1::2], strict=True)]
    low, high = figures.tea_range or (0, 0)
    assert 0 < low < high
    # Nine changes, five coefficients: the fit is near each, not on it.
    at = sorted(mean)
    assert min(at) / 3 < figures.polynomial(False)(low) < max(at) * 3


def test_a_calibration_needs_whole_schedules(transformer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"7 steps or more of each network.*runs 4 of 10"):
        run(transformer, Recorder(), part(end_step=4))
    with pytest.raises(ValueError, match="nothing was measured yet"):
        Recorder().figures(5.0)
    recorder = measured(transformer)
    with pytest.raises(ValueError, match="one schedule"):
        run(transformer, recorder, part(shift=3.0))


def test_files_come_back_as_they_were_measured(checkpoint: CheckpointInfo, transformer: nn.Module) -> None:
    recorder = measured(transformer)
    (path,) = save(recorder, [checkpoint], Request("", sampling=TEN))
    assert path.name == "own.v2.cache.json" and sorted(p.name for p in path.parent.iterdir()) == [
        "own.v2.cache.json",
        "own.v2.safetensors",
    ]
    assert path.stat().st_size < 4000
    (found,) = figures_for(Cache("teacache"), [checkpoint])
    told = recorder.figures(5.0)
    assert (found.tea, found.tea_projected, found.mag, found.mag_uncond) == (
        told.tea, told.tea_projected, told.mag, told.mag_uncond,
    )  # fmt: skip
    assert (found.tea_range, found.steps, found.shift) == (told.tea_range, 10, 5.0)
    assert json.loads(path.read_text())["roles"]["alone"]["measured"]["prompts"] == 1
    out = run(transformer, choose(Cache("teacache", 0.1, figures=str(path)), [checkpoint]))
    assert out.isfinite().all()


def test_a_checkpoint_keeps_the_figures_of_both_its_roles(
    checkpoint: CheckpointInfo, tmp_path: Path, transformer: nn.Module
) -> None:
    high = write(tmp_path / "high.safetensors", transformer)
    save(measured(transformer), [checkpoint], Request("", sampling=TEN))
    with pytest.raises(ValueError, match="measured alone, not low"):
        save_pair = [write(tmp_path / "a.safetensors", transformer), checkpoint]
        figures_path(save_pair[0].path).write_text(
            figures_path(checkpoint.path).read_text().replace('"alone"', '"high"'), encoding="utf-8"
        )
        figures_for(Cache("magcache"), save_pair)
    pair = Model(T2V, CPU, lambda: transformer, lambda: transformer)
    sampling = part(steps=20, boundary_step=8)
    paths = save(measured(transformer, sampling, pair), [high, checkpoint], Request("", sampling=sampling))
    assert [path.name for path in paths] == ["high.cache.json", "own.v2.cache.json"]
    both = figures_for(Cache("magcache"), [high, checkpoint])
    assert [(one.steps, Cache("magcache").limit(one.usual)) for one in both] == [(8, 0.06), (12, 0.06)]
    assert figures_for(Cache("magcache"), [checkpoint])[0].steps == 10


def test_figures_of_another_checkpoint_are_refused(checkpoint: CheckpointInfo, transformer: nn.Module) -> None:
    (path,) = save(measured(transformer), [checkpoint], Request("", sampling=TEN))
    other = wan()
    other.head.modulation += 1
    tuned = write(checkpoint.path.with_name("tuned.safetensors"), other)
    figures_path(tuned.path).write_text(path.read_text(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"measured on another checkpoint than tuned\.safetensors"):
        figures_for(Cache("teacache"), [tuned])
    assert figures_for(Cache("teacache", figures=str(path)), [tuned]), "named on purpose, they may serve a relative"
    told = json.loads(path.read_text())
    told["checkpoint"]["variant"] = "wan2.1_i2v"
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"measured on wan2\.1_i2v, the model is wan2\.1_t2v"):
        figures_for(Cache("teacache"), [checkpoint])
    for damaged in ("{", '{"format": "other"}', "[]", json.dumps({**told, "roles": {"alone": {}}})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="cannot be read as cache figures"):
            figures_for(Cache("teacache"), [checkpoint])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wan2.1_t2v_14B_fp8.safetensors", "wan2.1_t2v_14B_fp8.cache.json"),
        ("diffusion_pytorch_model-00001-of-00006.safetensors", "diffusion_pytorch_model.cache.json"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.cache.json"),
        ("wan2.1-t2v-14b-Q8_0.gguf", "wan2.1-t2v-14b-Q8_0.cache.json"),
        ("high_noise_model", "high_noise_model.cache.json"),
    ],
)
def test_figures_lie_next_to_the_checkpoint(name: str, expected: str) -> None:
    assert figures_path(Path("/models") / name) == Path("/models") / expected


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "some"}, r"cache method='some' is not one of none, teacache, magcache"),
        ({"threshold": -0.1}, r"threshold=-0\.1 must be from 0 \(off\)"),
        ({"threshold": math.nan}, r"threshold=nan"),
        ({"max_skips": -1}, r"max_skips=-1"),
        ({"retention_ratio": 1.5}, r"retention_ratio=1\.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cache(**settings)


def test_each_method_has_its_threshold() -> None:
    usual = {"teacache": 0.08}
    caches = (Cache("teacache"), Cache("teacache", 0.2), Cache("teacache", use_ret_steps=True), Cache("magcache"))
    assert [cache.limit(usual) for cache in caches] == [0.08, 0.2, 0.15, 0.24]
    assert caches[0].limit({}) == 0.15


def test_what_a_cache_keeps_is_counted(checkpoint: CheckpointInfo) -> None:
    # 2 x 2 x 3 tokens of 128 channels: two residuals and the tokens that a pass began with.
    assert kept_bytes(checkpoint, EMPTY.shape, torch.bfloat16) == 3 * 12 * 128 * 2
