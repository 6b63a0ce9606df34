"""Manners in memory: what ComfyUI's flags ask for, memory that runs out, and what is on the device afterwards."""

import pytest
import torch

from dev.comfyui import PACK_NAME, find_comfyui
from dev.environment import REPOSITORY
from host.graphs import Graph, base, keep, node, our_sampler
from host.server import start
from host.tiny_models import write_tiny_models

pytestmark = pytest.mark.host


def failing(tiny_models, calls: str, **changes) -> Graph:
    graph = {**base(tiny_models), "failing": node("FixtureFailingModel", model=["ours", 0], calls=calls)}
    return keep({**graph, "sample": our_sampler(model=["failing", 0], **changes)}, "sample")


def test_memory_that_runs_out_once_changes_nothing(host, tiny_models) -> None:
    changes = {"offload": "block", "vram_budget": 1.0, "seed": 21}
    plain = keep({**base(tiny_models), "sample": our_sampler(**changes)}, "sample")
    expected = host.run(plain).expect().kept("keep_sample")["samples"]
    graph = failing(tiny_models, "2", **changes)
    graph["loaded"] = node("FixtureLoadedModels", after=["sample", 0])
    before = len(host.log())
    result = host.run(graph).expect()
    assert torch.equal(result.kept("keep_sample")["samples"], expected)
    log = host.log()[before:]
    assert "once more with less of the model on the GPU" in log and log.count("memory: ") == 2
    assert '"bytes": ' not in result.text("loaded").replace('"bytes": 0', "")


def test_memory_that_runs_out_twice_is_an_error_in_words(host, tiny_models) -> None:
    result = host.run(failing(tiny_models, "1, 3", offload="block", seed=22)).expect("error")
    assert "GPU memory ran out" in result.message and "instead of 17 frames of 128x96" in result.message
    result = host.run(failing(tiny_models, "1", offload="model", seed=23)).expect("error")
    assert "use auto or block" in result.message
    host.run(keep({**base(tiny_models), "sample": our_sampler(seed=24)}, "sample")).expect()


def test_flags_about_memory_are_not_in_the_way(host, tiny_models, tmp_path) -> None:
    """They ask for what only a GPU has; --lowvram and --gpu-only exclude --cpu."""
    graph = keep({**base(tiny_models), "sample": our_sampler(steps=1, seed=25)}, "sample")
    expected = host.run(graph).expect().kept("keep_sample")["samples"]
    packs = {PACK_NAME: REPOSITORY, "fixture_pack": REPOSITORY / "tests" / "host" / "fixture_pack"}
    flags = ["--reserve-vram", "1.5", "--disable-pinned-memory", "--disable-async-offload", "--disable-smart-memory"]
    root = find_comfyui()
    assert root is not None
    with start(root, tmp_path, packs, [], extra=flags) as server:
        write_tiny_models(server.base / "models")
        assert torch.equal(server.run(graph).expect().kept("keep_sample")["samples"], expected)
