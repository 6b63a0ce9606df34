"""Clips of the small model with caches: what was asked for must still be seen."""

from __future__ import annotations

import pytest
import torch

from demo.grammar import held_out_pairs, parse
from demo.judge import judge, score
from demo.world import FRAMES, HEIGHT, WIDTH
from dev.environment import REPOSITORY
from lightx2v import LightX2VPipeline
from lightx2v.cache.lookup import figures_for
from lightx2v.config import Cache
from lightx2v.identify import identify

MODEL = REPOSITORY / "demo" / "models" / "wan2.1_t2v"


@pytest.fixture(scope="module")
def pipe() -> LightX2VPipeline:
    pipe = LightX2VPipeline(MODEL)
    pipe.create_generator(infer_steps=20, height=HEIGHT, width=WIDTH, num_frames=FRAMES, guidance_scale=4)
    return pipe


@pytest.mark.parametrize(("method", "least"), [("Tea", 0.4), ("Mag", 0.5)])
def test_clips_keep_what_was_asked_for_at_the_default_thresholds(
    pipe: LightX2VPipeline, method: str, least: float
) -> None:
    pipe.enable_cache(method)
    pairs, clips = held_out_pairs(2), []
    for prompt, seed in pairs:
        video = pipe.generate(seed, prompt, return_result_tensor=True, progress=False)["video"]
        assert video is not None
        clips.append(video.permute(3, 0, 1, 2)[None] * 2 - 1)
    rates = score(judge(torch.cat(clips)), [parse(prompt) for prompt, _ in pairs]).rates()
    assert pipe.cache_reports[0].saved >= least, pipe.cache_reports[0].describe()
    assert rates["colour"] == rates["shape"] == rates["direction"] == 1


def test_every_transformer_of_the_pack_is_measured() -> None:
    base = identify(MODEL / "diffusion_pytorch_model.safetensors")
    variants = MODEL.parent / "variants"
    high = identify(variants / "wan_t2v_high_noise_fp8_e4m3.safetensors")
    images = identify(variants / "wan_i2v_fp8_scaled.safetensors")
    cache = Cache("magcache")
    assert [one.steps for one in figures_for(cache, [base])] == [20]
    assert sum(one.steps for one in figures_for(cache, [high, base])) == 20
    assert len(figures_for(cache, [images])[0].tea) == 5
