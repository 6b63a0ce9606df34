"""The harness itself, on nodes of ComfyUI and of the fixture pack alone."""

from __future__ import annotations

import json

import av
import pytest
import torch

pytestmark = pytest.mark.host

WAN_CONDITIONING = {
    "positive": {"class_type": "FixtureWanConditioning", "inputs": {"seed": 1, "tokens": 512}},
    "negative": {"class_type": "FixtureWanConditioning", "inputs": {"seed": 2, "tokens": 512}},
}


def native_graph(tiny_models, steps: int = 3) -> dict:
    """Text to video by ComfyUI's own nodes: 128x96, 17 frames."""
    return {
        **WAN_CONDITIONING,
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": tiny_models.diffusion_model, "weight_dtype": "default"},
        },
        "shifted": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["model", 0], "shift": 5.0}},
        "empty": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 128, "height": 96, "length": 17, "batch_size": 1},
        },
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                **{"model": ["shifted", 0], "positive": ["positive", 0], "negative": ["negative", 0]},
                **{"latent_image": ["empty", 0], "seed": 3, "steps": steps, "cfg": 5.0, "denoise": 1.0},
                **{"sampler_name": "euler", "scheduler": "simple"},
            },
        },
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": tiny_models.vae}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}},
        "video": {"class_type": "CreateVideo", "inputs": {"images": ["decode", 0], "fps": 16.0}},
        "save": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["video", 0], "filename_prefix": "video/native", "format": "mp4", "codec": "h264"},
        },
        "latents": {"class_type": "FixtureKeep", "inputs": {"value": ["sample", 0]}},
        "frames": {"class_type": "FixtureKeep", "inputs": {"value": ["decode", 0]}},
    }


def test_every_node_describes_itself(host):
    nodes = host.get("/object_info")
    assert {"KSampler", "SaveVideo", "FixtureKeep", "FixtureUmt5Clip"} <= set(nodes)


def test_native_text_to_video(host, tiny_models):
    result = host.run(native_graph(tiny_models)).expect()
    latents, frames = result.kept("latents"), result.kept("frames")
    assert latents["samples"].shape == (1, 16, 5, 12, 16)
    assert frames.shape == (17, 96, 128, 3)
    assert latents["samples"].std() > 0.1 and frames.std() > 0.01
    (path,) = result.files("save", host.base)
    with av.open(str(path)) as video:
        assert len(list(video.decode(video=0))) == 17
    assert {node for node, _, _ in result.progress} >= {"sample"}
    assert result.previews and result.previews[0].node == "sample"


def test_a_second_run_reuses_every_node(host, tiny_models):
    graph = native_graph(tiny_models, steps=2)
    first = host.run(graph).expect()
    second = host.run(graph).expect()
    assert second.cached >= set(graph)
    torch.testing.assert_close(second.kept("latents"), first.kept("latents"), rtol=0, atol=0)


def test_cancel_ends_a_graph_between_steps(host, tiny_models):
    result = host.run(native_graph(tiny_models, steps=5000), interrupt_after=2)
    assert result.expect("interrupted").progress[-1][1] < 5000
    # The flag is cleared: the next graph runs.
    host.run(native_graph(tiny_models, steps=1)).expect()


def test_a_refused_graph_says_why(host, tiny_models):
    graph = native_graph(tiny_models)
    graph["sample"]["inputs"]["sampler_name"] = "no such sampler"
    assert "no such sampler" in host.run(graph).expect("rejected").message


def test_a_failing_node_says_why(host, tiny_models):
    load = {"class_type": "FixtureUmt5Clip", "inputs": {"file": "nothing.safetensors", "tokenizer": ""}}
    encode = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 0], "text": "a"}}
    keep = {"class_type": "FixtureKeep", "inputs": {"value": ["encode", 0]}}
    result = host.run({"load": load, "encode": encode, "keep": keep}).expect("error")
    assert result.error["node_id"] == "load" and "nothing.safetensors" in result.message
    with pytest.raises(AssertionError, match=r"nothing\.safetensors"):
        result.expect()


def test_native_text_encoding_of_a_small_umt5(host, tiny_models):
    load = {"class_type": "FixtureUmt5Clip", "inputs": {"file": tiny_models.text_encoder, "tokenizer": ""}}
    graph: dict = {"load": load}
    for name, text in (("red", "a red circle"), ("blue", "a blue circle")):
        graph[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 0], "text": text}}
        graph[f"keep_{name}"] = {"class_type": "FixtureKeep", "inputs": {"value": [name, 0]}}
    result = host.run(graph).expect()
    ((red, options),), ((blue, _),) = result.kept("keep_red"), result.kept("keep_blue")
    assert red.shape == (1, 512, 4096) and options == {"pooled_output": None}
    used = int((red.abs().sum(-1) > 0).sum())
    assert 3 < used < 40, "rows behind the prompt's end are zero"
    assert not torch.allclose(red, blue)


def test_memory_nodes_see_what_the_host_holds(host, tiny_models):
    graph = {
        "hold": {"class_type": "FixtureHoldMemory", "inputs": {"megabytes": 8}},
        "loaded": {"class_type": "FixtureLoadedModels", "inputs": {"after": ["hold", 0]}},
    }
    held = [json.loads(line) for line in host.run(graph).expect().text("loaded").splitlines()]
    assert {"patcher": "ModelPatcher", "module": "Linear", "bytes": 8 * 2**20} in held
