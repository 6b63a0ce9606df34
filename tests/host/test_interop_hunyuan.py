"""HunyuanVideo-1.5: our nodes beside ComfyUI's on the same small files, and each other's conditioning and latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny_encoders15 as encoders
from host.graphs import SHIFT, Graph, keep, native_sampler, node, our_sampler
from host.test_image_nodes import assert_same as assert_equal
from host.test_interop import assert_same, samples
from lightx2v.text.chat import SYSTEM
from tiny_hunyuan import CONFIG, make_tiny, to_merged

pytestmark = pytest.mark.host

MODEL, QWEN, BYT5, SIGLIP = (f"tiny_hunyuan_{part}.safetensors" for part in ("t2v", "qwen", "byt5", "siglip"))
# ComfyUI fixes the width of SigLIP's tokens and Qwen's vocabulary; the rest is free.
LANGUAGE = replace(encoders.QWEN, vocab_size=152064, hidden_size=64, num_layers=4)
EYES = replace(encoders.SIGLIP, hidden_size=1152, num_layers=2, grid=2)
SIZE = {"width": 128, "height": 96, "length": 9, "batch_size": 1}
PROMPT, AVOID = 'a cat and a sign "OPEN"', 'a blurred "logo"'


def conversation(prompt: str) -> str:
    """As we ask; ComfyUI's own text encode takes one that is written out."""
    system, user = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", f"<|im_start|>user\n{prompt}<|im_end|>\n"
    return f"{system}{user}<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def files(host) -> Iterator[None]:
    models = host.base / "models"
    config = replace(CONFIG, num_layers=2, text_dim=LANGUAGE.hidden_size, image_dim=EYES.hidden_size)
    written = {
        models / "diffusion_models" / MODEL: to_merged(make_tiny(config).state_dict()),
        models / "text_encoders" / QWEN: encoders.qwen_state(LANGUAGE),
        models / "text_encoders" / BYT5: encoders.byt5_state(),
        models / "clip_vision" / SIGLIP: {
            name: tensor.half() for name, tensor in encoders.siglip_state(EYES).items()
        },  # as ComfyUI holds it
    }
    for path, state in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    yield
    for path in written:
        path.unlink()


def base() -> Graph:
    return {
        "ours": node("LightX2VLoadModel", original_ckpt=MODEL, dtype="auto"),
        "unet": node("UNETLoader", unet_name=MODEL, weight_dtype="default"),
        "native": node("ModelSamplingSD3", model=["unet", 0], shift=SHIFT),
        "encoder": node("LightX2VLoadTextEncoder", text_encoder=QWEN, text_encoder_2=BYT5),
        "positive": node("LightX2VTextEncode", encoder=["encoder", 0], text=PROMPT),
        "negative": node("LightX2VTextEncode", encoder=["encoder", 0], text=AVOID),
        "empty": node("LightX2VEmptyLatent", family="hunyuan1.5", **SIZE),
    }


def native_text() -> Graph:
    return {
        "clip": node("FixtureHunyuanClip", language=QWEN, glyphs=BYT5),
        "native_positive": node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "native_negative": node("CLIPTextEncode", clip=["clip", 0], text=AVOID),
        "native_avoided": node("CLIPTextEncode", clip=["clip", 0], text=conversation(AVOID)),
        "native_asked": node("CLIPTextEncode", clip=["clip", 0], text=conversation(PROMPT)),
        "native_nothing": node("CLIPTextEncode", clip=["clip", 0], text=conversation(" ")),
    }


def pictures() -> Graph:
    return {
        "vae": node("FixtureCellVae", channels=32),
        "first": node("FixturePicture", seed=1, frames=1, height=90, width=160),
        "eyes": node("LightX2VLoadImageEncoder", image_encoder=SIGLIP),
        "seen": node("LightX2VImageEncode", encoder=["eyes", 0], image=["first", 0], crop="none"),
        "native_eyes": node("FixtureClipVision", file=SIGLIP),
        "native_seen": node("CLIPVisionEncode", clip_vision=["native_eyes", 0], image=["first", 0], crop="none"),
    }


def test_text_both_ways(host, files) -> None:
    """The same conditioning on the same conversation, and either side's text through either side's sampler."""
    links = {"positive": ["native_positive", 0], "negative": ["native_negative", 0]}
    graph = {
        **base(),
        **native_text(),
        "all_native": native_sampler(),
        "all_ours": our_sampler(),
        "native_on_native_text": native_sampler(**links),
        "ours_on_native_text": our_sampler(**links),
    }
    graph["nothing"] = node("LightX2VTextEncode", encoder=["encoder", 0], text="")
    texts = ("positive", "negative", "nothing", "native_asked", "native_avoided", "native_nothing")
    result = host.run(
        keep(graph, *texts, "all_native", "all_ours", "native_on_native_text", "ours_on_native_text")
    ).expect()
    kept = {name: result.kept(f"keep_{name}")[0] for name in texts}
    for ours, native in (("positive", "native_asked"), ("negative", "native_avoided"), ("nothing", "native_nothing")):
        assert_equal(kept[ours][1], kept[native][1], ours, 1e-4)
        torch.testing.assert_close(kept[ours][0], kept[native][0], rtol=1e-4, atol=1e-4)
    assert ["conditioning_byt5small" in kept[name][1] for name in texts[:3]] == [True, True, False]
    assert_same(samples(result, "all_ours"), samples(result, "all_native"))
    assert_same(samples(result, "ours_on_native_text"), samples(result, "native_on_native_text"))
    difference = samples(result, "ours_on_native_text") - samples(result, "all_ours")
    assert difference.abs().max() > 1e-3, "ComfyUI asks in other words than the model was trained on"


@pytest.mark.parametrize("change", ["halves", "batch and cfg", "native empty"])
def test_latents_both_ways(host, files, change: str) -> None:
    graph, native, ours = base(), native_sampler(), our_sampler()
    if change == "halves":
        graph |= {
            "first_native": native_sampler(end=3),
            "first_ours": our_sampler(end_at_step=3),
            "whole": native,
        }
        native, ours = (
            native_sampler("first_ours", start=3),
            our_sampler("first_native", start_at_step=3, add_noise=False),
        )
    elif change == "batch and cfg":
        graph["empty"]["inputs"]["batch_size"] = 2
        native, ours = native_sampler(cfg=1.0), our_sampler(cfg=1.0)
    else:
        graph["empty"] = node("EmptyHunyuanVideo15Latent", **SIZE)
    graph |= {"native_out": native, "our_out": ours}
    names = ["native_out", "our_out", *(["whole"] if change == "halves" else [])]
    result = host.run(keep(graph, *names)).expect()
    assert_same(samples(result, "our_out"), samples(result, "native_out"))
    if change == "halves":
        assert_same(samples(result, "our_out"), samples(result, "whole"))


def to_video(kind: str, features: str, seen: str) -> dict[str, Any]:
    links = {"positive": ["positive", 0], "negative": ["negative", 0], "vae": ["vae", 0], "start_image": ["first", 0]}
    return node(kind, **links, **{features: [seen, 0]}, **SIZE)


def test_pictures_both_ways(host, files) -> None:
    graph = {
        **base(),
        **pictures(),
        "our_video": to_video("LightX2VImageToVideo", "clip_vision_start_image", "seen"),
        "native_video": to_video("HunyuanVideo15ImageToVideo", "clip_vision_output", "native_seen"),
    }
    for source in ("our_video", "native_video"):
        links = {"positive": [source, 0], "negative": [source, 1]}
        graph[f"native_on_{source}"] = native_sampler(steps=3, **links)
        graph[f"ours_on_{source}"] = our_sampler(steps=3, **links)
    graph["no_picture"] = our_sampler(steps=3)
    drawn = [f"{side}_on_{source}" for side in ("native", "ours") for source in ("our_video", "native_video")]
    both = ("our_video", "native_video")
    kept = {f"keep_{name}_{index}": node("FixtureKeep", value=[name, index]) for name in both for index in range(3)}
    result = host.run({**keep(graph, *drawn, "no_picture"), **kept}).expect()
    for index in range(2):
        ((_, ours),), ((_, native),) = (result.kept(f"keep_{name}_{index}") for name in ("our_video", "native_video"))
        seen, shown = ours.pop("clip_vision_output"), native.pop("clip_vision_output")
        assert_equal(ours, native, tolerance=1e-5)
        for key in ("last_hidden_state", "penultimate_hidden_states", "image_embeds"):
            torch.testing.assert_close(seen[key], shown[key], rtol=1e-3, atol=1e-3)
    assert torch.equal(result.kept("keep_our_video_2")["samples"], result.kept("keep_native_video_2")["samples"])
    for source in ("our_video", "native_video"):
        assert_same(samples(result, f"ours_on_{source}"), samples(result, f"native_on_{source}"))
    assert (samples(result, "ours_on_our_video") - samples(result, "no_picture")).abs().max() > 0.01


def test_pickers_and_refusals(host, files, tiny_models) -> None:
    told = host.get("/object_info/LightX2VLoadTextEncoder")["LightX2VLoadTextEncoder"]["input"]
    first = told["required"]["text_encoder"][1]["options"]
    second = told["optional"]["text_encoder_2"][1]["options"]
    assert {QWEN, tiny_models.text_encoder} <= set(first) and BYT5 not in first
    assert second[0] == "none" and BYT5 in second and QWEN not in second
    umt5 = node("LightX2VLoadTextEncoder", text_encoder=tiny_models.text_encoder, text_encoder_2=BYT5)
    two = {"two": umt5, "text": node("LightX2VTextEncode", encoder=["two", 0], text="a cat")}
    assert "is umT5, which has no second encoder" in host.run(keep(two, "text")).expect("error").message
    alone = {
        "alone": node("LightX2VLoadTextEncoder", text_encoder=QWEN),
        "text": node("LightX2VTextEncode", encoder=["alone", 0], text=PROMPT),
    }
    assert "the prompt quotes text, which needs byT5" in host.run(keep(alone, "text")).expect("error").message
    end = to_video("LightX2VImageToVideo", "clip_vision_start_image", "seen")
    end["inputs"]["end_image"] = ["first", 0]
    ends = {**base(), **pictures(), "video": end}
    assert "can start from an image but not end on one" in host.run(keep(ends, "video")).expect("error").message
