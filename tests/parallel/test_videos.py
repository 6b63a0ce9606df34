"""Whole videos by several processes are those of one: latents to 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from closeness import relative_error
from demo.shipped import SHIPPED
from lightx2v import LightX2VPipeline
from ranks import Ranks

# Odd numbers of tokens: 3 latent frames of 3 x 5.
SMALL: Mapping[str, Any] = {"height": 48, "width": 80, "num_frames": 9, "infer_steps": 3}


def latents_of(pipe: LightX2VPipeline, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """The last estimate (on rank 0) of a short video, and its frames."""
    seen: list[Tensor] = []
    asked = {"seed": 5, "prompt": "a red circle moves to the right", "progress": False, **changes}
    made = pipe.generate(return_result_tensor=True, on_step=lambda step, x0: seen.append(x0.clone()), **asked)
    return (seen[-1] if seen else torch.empty(0)), made["video"]


def shipped(name: str, parallel: Mapping[str, Any]) -> Any:
    pipe = SHIPPED[name].pipeline(**SMALL)
    if parallel:
        pipe.enable_parallel(**parallel)
    return latents_of(pipe)


def test_t2v(two: Ranks) -> None:
    whole, frames = shipped("t2v", {})
    for parallel in ({"seq_p_size": 2}, {"seq_p_size": 2, "seq_p_attn_type": "ring"}, {"cfg_p_size": 2}):
        (found, video), (_, nothing) = two.run(shipped, "t2v", parallel)
        assert relative_error(found, whole) < 1e-5, parallel
        assert relative_error(video, frames) < 1e-4 and nothing is None
