"""Manners in memory: what ComfyUI's flags ask for, memory that runs out, and what is on the device afterwards."""

import json

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


def test_a_text_encoder_without_room_computes_on_the_cpu(host, tiny_models) -> None:
    graph = {
        "text": node("LightX2VLoadTextEncoder", text_encoder=tiny_models.text_encoder),
        "plain": node("LightX2VTextEncode", encoder=["text", 0], text="a red circle"),
        "failing": node("FixtureFailingEncoder", encoder=["text", 0]),
        "other": node("LightX2VTextEncode", encoder=["failing", 0], text="a red circle"),
    }
    expected = host.run(keep(graph, "plain")).expect().kept("keep_plain")
    found = host.run(keep(graph, "other")).expect().kept("keep_other")
    assert torch.equal(found[0][0], expected[0][0])
    assert "Too little GPU memory for the text encoder: it runs on the CPU" in host.log()


def test_weights_that_ram_cannot_hold_stay_in_their_file(host, tiny_models) -> None:
    """And come back as a whole, when there is room again or ComfyUI moves the model."""
    host.post("/free", {"unload_models": True, "free_memory": True})
    block = {"offload": "block", "seed": 26}
    start = base(tiny_models)
    little = node("FixtureFreeRam", latent_in=["empty", 0], megabytes=100)
    much = node("FixtureFreeRam", latent_in=["empty", 0], megabytes=-1)
    a, b = our_sampler("little", **block), our_sampler("little", **block, attention="reference")
    report = node("LightX2VReport", latent=["a", 0])
    first = host.run(keep({**start, "little": little, "a": a, "report": report}, "a")).expect()
    other = host.run(keep({**start, "little": little, "b": b}, "b")).expect()
    c, d = our_sampler("much", seed=26), our_sampler("much", **block)
    plain = host.run(keep({**start, "much": much, "c": c, "d": d}, "c", "d")).expect()
    assert "2 blocks are read from the file as they are needed" in first.text("report")
    expected = plain.kept("keep_c")["samples"]
    assert torch.equal(first.kept("keep_a")["samples"], expected)
    assert torch.equal(plain.kept("keep_d")["samples"], expected)
    torch.testing.assert_close(other.kept("keep_b")["samples"], expected, rtol=0, atol=1e-4)


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


def test_what_comfyuis_flags_make_of_a_plan(host, tiny_models) -> None:
    """On a GPU that is pretended."""
    model = node("LightX2VLoadModel", original_ckpt=tiny_models.diffusion_model, dtype="fp32")

    def planned(offload: str = "auto", **flags: object) -> dict:
        asked = {"flags": json.dumps(flags), "offload": offload, "megabytes": 1500}
        graph = {"ours": model, "plan": node("FixturePlanWith", model=["ours", 0], **asked)}
        return json.loads(host.run(graph).expect().text("plan"))

    plain = planned()
    assert plain["resident"] == 2 and not plain["ram"]
    for flag in ("lowvram", "novram"):
        little = planned(**{flag: True})
        assert little["streamed"] == 2 and little["pinned"] == little["ram"] > 0
        unpinned = planned(**{flag: True}, disable_pinned_memory=True)
        assert unpinned["streamed"] == 2 and unpinned["ram"] == little["ram"] and not unpinned["pinned"]
    for flag in ("gpu_only", "highvram"):
        assert planned(**{flag: True}) is None, "whole, and where ComfyUI has it"
        assert planned("block", **{flag: True})["streamed"] == 2, "what is asked for by name is done"
    assert planned("model") is None
    assert plain["budget"] - planned(reserve_vram=0.8)["budget"] == pytest.approx(0.4 * 2**30, abs=2)
