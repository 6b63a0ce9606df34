"""However the small models are placed, whatever their layers multiply in, with and without a cache: the same clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.shipped import SHIPPED, T2V
from lightx2v import LightX2VPipeline
from lightx2v.offload.plan import GB

SIZE = {"height": 64, "width": 64, "num_frames": 5, "infer_steps": 9}  # one more than those of which no cache skips any
CACHES: Mapping[str, Mapping[str, Any]] = {
    "None": {},
    "Tea": {"teacache_thresh": 5.0},
    "Mag": {"magcache_thresh": 5.0},
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="needs the package gguf")
    from formats.writers import gguf_q8_0

    state = {name: tensor.float() for name, tensor in load_file(T2V).items()}
    return gguf_q8_0(state, tmp_path_factory.mktemp("gguf"))[0]


@pytest.fixture(scope="module", params=["plain", "fp8", "int8", "nvfp4", "mxfp8", "gguf", "experts"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=DEVICES)
def pipe(request: pytest.FixtureRequest, scheme: str) -> LightX2VPipeline:
    """Of the small text-to-video model, or of its two experts: one in fp8, the other as it was trained."""
    shipped = SHIPPED["moe" if scheme == "experts" else "t2v"]
    made = LightX2VPipeline(T2V.parent, device=request.param, **shipped.model)
    made.create_generator(**SIZE, guidance_scale=4.0, **shipped.generator)
    if scheme in ("fp8", "int8", "nvfp4", "mxfp8"):
        made.enable_quantize(dit_quantized=True, quant_scheme=scheme)
    elif scheme == "gguf":
        packed = request.getfixturevalue("gguf")
        made.enable_quantize(dit_quantized=True, dit_quantized_ckpt=packed, quant_scheme="gguf-Q8_0")
    return made


def clip(pipe: LightX2VPipeline, cache: str) -> Tensor:
    steps = 2 if cache == "None" else SIZE["infer_steps"]
    made = pipe.generate(7, "a red circle", infer_steps=steps, progress=False, return_result_tensor=True)["video"]
    assert made is not None
    return made


def half(pipe: LightX2VPipeline) -> float:
    """GB of a budget with which some blocks stay and some pass, and one pass of guidance has room to wait."""
    plan = pipe.memory_plan
    assert plan is not None and plan.streamed and not plan.resident
    return (plan.peak + 3 * plan.passing / plan.streamed + 0.5) / GB


@pytest.mark.parametrize("cache", CACHES)
def test_however_it_is_placed(pipe: LightX2VPipeline, scheme: str, cache: str) -> None:
    # the file in GGML's blocks lies elsewhere, without the figures that were measured
    named = {} if scheme == "experts" else {"figures": T2V.with_name("diffusion_pytorch_model.cache.json")}
    pipe.enable_cache(cache, **CACHES[cache], **named)
    pipe.enable_offload()
    expected = clip(pipe, cache)
    assert expected.std() > 0.01 and pipe.memory_plan is None
    assert bool(pipe.cache_reports) == (cache != "None")
    assert all(report.saved > 0 for report in pipe.cache_reports), [each.describe() for each in pipe.cache_reports]
    for granularity in ("auto", "model", "phase", "block"):
        pipe.enable_offload(True, granularity, vae_offload=True)
        assert torch.equal(clip(pipe, cache), expected), granularity
    pipe.enable_offload(True, "block", vae_offload=True, vram_budget_gb=half(pipe))
    assert torch.equal(clip(pipe, cache), expected)
    plan = pipe.memory_plan
    assert plan is not None and plan.streamed and plan.resident and not plan.filed and plan.paired
    pipe.enable_offload(True, "block", ram_budget_gb=1e-6)
    assert torch.equal(clip(pipe, cache), expected)
    plan = pipe.memory_plan
    assert plan is not None and plan.filed == plan.streamed and plan.paired
