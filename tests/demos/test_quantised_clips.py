"""What 8 bits change in a clip of the small model, whose narrow layers are rounded worse than any published one's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from demo.shipped import SHIPPED
from lightx2v import LightX2VPipeline

LEAST_DB = 30.0  # 4 steps at seed 3: 32.2 in fp8, 39.5 in int8


@pytest.fixture(scope="module")
def pipe() -> LightX2VPipeline:
    return SHIPPED["t2v"].pipeline(infer_steps=4)


@pytest.fixture(scope="module")
def plain(pipe: LightX2VPipeline) -> Tensor:
    return clip(pipe)


def clip(pipe: LightX2VPipeline) -> Tensor:
    prompt = "a red circle moves right over a white background"
    made = pipe.generate(seed=3, prompt=prompt, return_result_tensor=True, progress=False)["video"]
    assert made is not None
    return made


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_clip_in_8_bits_is_the_same_clip(scheme: str, pipe: LightX2VPipeline, plain: Tensor) -> None:
    pipe.enable_quantize(dit_quantized=True, quant_scheme=scheme)
    found = clip(pipe)
    assert plain.std() > 0.05 and not torch.equal(found, plain)
    decibels = -10 * torch.log10((found - plain).square().mean()).item()
    assert decibels >= LEAST_DB, f"{scheme}: {decibels:.1f} dB"
