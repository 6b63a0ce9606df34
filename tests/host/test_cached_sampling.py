"""Caches in ComfyUI: the sampler's widget, the node with the rest, and a model that nobody measured."""

from __future__ import annotations

import pytest
import torch

from host.client import Graph
from host.graphs import base, keep, node, our_sampler

pytestmark = pytest.mark.host
DEMO = "lightx2v-demo/wan2.1_t2v/diffusion_pytorch_model.safetensors"


def graph(tiny_models, demo: bool = True, options: dict | None = None, **changes) -> Graph:
    nodes = base(tiny_models)
    if demo:
        nodes["ours"] = node("LightX2VLoadModel", original_ckpt=DEMO, dtype="auto")
    if options is not None:
        defaults = {"use_ret_steps": False, "max_skips": 6, "retention_ratio": 0.2, "figures": "auto"}
        nodes["cache"] = node("LightX2VCache", **{**defaults, **options})
        changes["cache_options"] = ["cache", 0]
    return keep({**nodes, "sample": our_sampler(**{"steps": 10, **changes})}, "sample")


def made(host, prompt: Graph) -> tuple[torch.Tensor, str]:
    """The latents, and what the server said meanwhile."""
    before = len(host.log())
    return host.run(prompt).expect().kept("keep_sample")["samples"], host.log()[before:]


def test_the_widget_and_the_node_skip_the_same(host, tiny_models) -> None:
    plain, said = made(host, graph(tiny_models))
    assert "skips steps" not in said
    by_widget, said = made(host, graph(tiny_models, cache="magcache"))
    assert "magcache: skips steps 3" in said and "of the passes saved" in said
    assert (by_widget - plain).abs().max() > 1e-3
    by_node, _ = made(host, graph(tiny_models, options={"method": "magcache", "threshold": 0.24}, cache="teacache"))
    assert torch.equal(by_node, by_widget), "what is connected counts"
    off, _ = made(host, graph(tiny_models, options={"method": "teacache", "threshold": 0.0}))
    assert torch.equal(off, plain)


def test_few_steps_turn_it_off(host, tiny_models) -> None:
    _, said = made(host, graph(tiny_models, cache="teacache", steps=8))
    assert "teacache: off: 8 steps; caches pay from 9 on" in said


def test_a_model_that_nobody_measured_is_said_in_words(host, tiny_models) -> None:
    result = host.run(graph(tiny_models, demo=False, cache="teacache"))
    assert result.status == "error"
    assert "no cache figures are known for Wan2.1 T2V" in result.message
    assert "python -m lightx2v calibrate" in result.message
