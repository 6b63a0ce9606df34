"""Pictures and two experts: our sampler beside ComfyUI's, on the same files and each other's conditioning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny_clip
from host.graphs import SHIFT, Graph, keep, native_sampler, node, our_sampler
from host.test_interop import assert_same, samples
from host.tiny_models import I2V, T2V, TI2V, Input, write_transformer
from lightx2v.vision.layout import Sizes

pytestmark = pytest.mark.host

# ComfyUI fixes the width of CLIP in Wan's models; its depth and grid are free.
CLIP = Sizes(hidden_size=1280, ffn_size=64, num_layers=2, patch_size=14, grid=2, projection_size=64)
TOKENS = CLIP.grid**2 + 1
MODELS = {
    "wan2.1_i2v": Input(channels=36, clip=1280),
    "wan2.1_flf2v": Input(channels=36, clip=1280, positions=2 * TOKENS),
    "wan2.2_i2v": I2V,
    "wan2.2_ti2v": TI2V,
    "wan2.2_t2v_high_noise": T2V,
    "wan2.2_t2v_low_noise": T2V,
    "wan2.2_i2v_high_noise": I2V,
    "wan2.2_i2v_low_noise": I2V,
}
SIZE = {"width": 128, "height": 96, "length": 17, "batch_size": 1}


def file(name: str) -> str:
    return f"tiny_{name}.safetensors"


@pytest.fixture(scope="module")
def models(host, tiny_models) -> Any:
    """Transformers of every kind and an image encoder beside the other tiny models."""
    folder = host.base / "models"
    for seed, (name, takes) in enumerate(MODELS.items(), start=1):
        write_transformer(folder / "diffusion_models" / file(name), takes, seed=seed, num_layers=1)
    (folder / "clip_vision").mkdir(exist_ok=True)
    clip = {n: t.half() if t.is_floating_point() else t for n, t in tiny_clip.state_dict(CLIP).items()}
    save_file(clip, folder / "clip_vision" / "tiny_clip_1280.safetensors")
    yield tiny_models
    (folder / "clip_vision" / "tiny_clip_1280.safetensors").unlink()


def native_model(name: str, prefix: str = "") -> Graph:
    return {
        f"{prefix}unet": node("UNETLoader", unet_name=file(name), weight_dtype="default"),
        f"{prefix}native": node("ModelSamplingSD3", model=[f"{prefix}unet", 0], shift=SHIFT),
    }


def base(models, name: str) -> Graph:
    """Both loaders of one file, prompts, two pictures and what the image encoder sees in them."""
    return {
        **native_model(name),
        "ours": node("LightX2VLoadModel", original_ckpt=file(name)),
        "text": node("FixtureWanConditioning", seed=1, tokens=64),
        "no_text": node("FixtureWanConditioning", seed=2, tokens=64),
        "vae": node("VAELoader", vae_name=models.vae),
        "first": node("FixturePicture", seed=1, frames=1, height=90, width=160),
        "last": node("FixturePicture", seed=2, frames=1, height=120, width=97),
        "encoder": node("LightX2VLoadImageEncoder", image_encoder="tiny_clip_1280.safetensors"),
        "first_seen": node("LightX2VImageEncode", encoder=["encoder", 0], image=["first", 0], crop="none"),
        "last_seen": node("LightX2VImageEncode", encoder=["encoder", 0], image=["last", 0], crop="none"),
    }


def conditioned(kind: str, **images: str) -> dict[str, Any]:
    links = {name: [source, 0] for name, source in images.items()}
    return node(kind, positive=["text", 0], negative=["no_text", 0], vae=["vae", 0], **SIZE, **links)


def fed(source: str) -> dict[str, Any]:
    return {"positive": [source, 0], "negative": [source, 1]}


CASES = {
    "wan2.1_i2v": ("WanImageToVideo", {"start_image": "first"}, {"clip_vision_output": "first_seen"}),
    "wan2.2_i2v": ("WanImageToVideo", {"start_image": "first"}, {}),
    "wan2.1_flf2v": (
        "WanFirstLastFrameToVideo",
        {"start_image": "first", "end_image": "last"},
        {"clip_vision_start_image": "first_seen", "clip_vision_end_image": "last_seen"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pictures_by_either_node_through_either_sampler(host, models, name: str) -> None:
    kind, images, features = CASES[name]
    ours = {"clip_vision_start_image" if n == "clip_vision_output" else n: value for n, value in features.items()}
    graph = {
        **base(models, name),
        "their_node": conditioned(kind, **images, **features),
        "our_node": conditioned("LightX2VImageToVideo", **images, **ours),
        "other_picture": conditioned(kind, **{**images, "start_image": "last"}, **features),
    }
    for source in ("their_node", "our_node", "other_picture"):
        graph[f"native_of_{source}"] = native_sampler(**fed(source), latent_image=[source, 2])
        graph[f"ours_of_{source}"] = our_sampler(**fed(source))
        graph[f"ours_of_{source}"]["inputs"]["latent"] = [source, 2]
    names = [f"{side}_of_{source}" for source in ("their_node", "our_node") for side in ("native", "ours")]
    result = host.run(keep(graph, *names, "native_of_other_picture", "ours_of_other_picture")).expect()
    expected = samples(result, "native_of_their_node")
    for sampled in names:
        assert_same(samples(result, sampled), expected)
    other = samples(result, "native_of_other_picture")
    assert_same(samples(result, "ours_of_other_picture"), other)
    assert (other - expected).abs().max() > 0.01, "the picture does not matter"


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_the_first_frame_of_ti2v(host, models, cfg: float) -> None:
    graph = base(models, "wan2.2_ti2v")
    graph["vae48"] = node("FixtureCellVae")
    graph["kept"] = node("Wan22ImageToVideoLatent", vae=["vae48", 0], start_image=["first", 0], **SIZE)
    inputs = {"positive": ["text", 0], "negative": ["no_text", 0], "cfg": cfg}
    graph |= {"native_out": native_sampler("kept", **inputs), "our_out": our_sampler("kept", **inputs)}
    result = host.run(keep(graph, "native_out", "our_out", "kept")).expect()
    assert_same(samples(result, "our_out"), samples(result, "native_out"))
    given = samples(result, "kept")[:, :, :1]
    torch.testing.assert_close(samples(result, "our_out")[:, :, :1], given, rtol=1e-4, atol=1e-4)


def experts(models, task: str, change: int) -> Graph:
    """The native way: a sampler for each expert, `change` steps for the first."""
    inputs = {"positive": ["text", 0], "negative": ["no_text", 0]}
    graph = {**base(models, f"wan2.2_{task}_high_noise"), **native_model(f"wan2.2_{task}_low_noise", "low_")}
    picked = {f"{role}_noise_original_ckpt": file(f"wan2.2_{task}_{role}_noise") for role in ("high", "low")}
    graph["ours"] = node("LightX2VLoadModelMoE", **picked)
    graph["empty"] = node("LightX2VEmptyLatent", family="wan2.1", **SIZE)
    if task == "i2v":
        graph["pictured"] = conditioned("WanImageToVideo", start_image="first")
        inputs = fed("pictured")
    graph["first_half"] = native_sampler(end=change, **inputs)
    graph["native_out"] = native_sampler("first_half", start=change, **{**inputs, "model": ["low_native", 0]})
    graph["our_out"] = our_sampler(**inputs)
    return graph


@pytest.mark.parametrize(
    ("task", "change", "settings"),
    [
        ("t2v", 3, {}),  # sigmas 1, 0.96, 0.91, 0.83, 0.71, 0.5; the model's own boundary is 0.875
        ("i2v", 3, {}),  # 0.9
        ("t2v", 2, {"boundary": 0.95}),
        ("t2v", 4, {"boundary_step": 4, "boundary": 0.95}),
    ],
)
def test_two_experts_are_two_samplers(host, models, task: str, change: int, settings: dict) -> None:
    graph = experts(models, task, change)
    graph["our_out"]["inputs"].update(settings)
    result = host.run(keep(graph, "native_out", "our_out")).expect()
    assert_same(samples(result, "our_out"), samples(result, "native_out"))


def test_each_expert_has_its_guidance(host, models) -> None:
    graph = experts(models, "t2v", 3)
    graph["native_out"]["inputs"]["cfg"] = 2.0
    graph["our_out"]["inputs"]["cfg_low"] = 2.0
    result = host.run(keep(graph, "native_out", "our_out")).expect()
    assert_same(samples(result, "our_out"), samples(result, "native_out"))


def test_two_experts_hand_over_in_the_middle(host, models) -> None:
    """Stopped before the change and taken on by either side, and taken over from the native high-noise expert."""
    graph = experts(models, "t2v", 3)
    whole = graph["our_out"]["inputs"]
    graph["until_two"] = node("LightX2VSampler", **{**whole, "end_at_step": 2})
    graph["on_with_ours"] = node(
        "LightX2VSampler", **{**whole, "latent": ["until_two", 0], "start_at_step": 2, "add_noise": False}
    )
    graph["ours_after_native"] = node(
        "LightX2VSampler", **{**whole, "latent": ["first_half", 0], "start_at_step": 3, "add_noise": False}
    )
    result = host.run(keep(graph, "native_out", "on_with_ours", "ours_after_native")).expect()
    for name in ("on_with_ours", "ours_after_native"):
        assert_same(samples(result, name), samples(result, "native_out"))


def test_what_does_not_fit_is_said_in_words(host, models) -> None:
    i2v, t2v = experts(models, "i2v", 3), experts(models, "t2v", 3)
    swapped = node(
        "LightX2VLoadModelMoE",
        high_noise_original_ckpt=file("wan2.2_t2v_low_noise"),
        low_noise_original_ckpt=file("wan2.2_t2v_high_noise"),
    )
    cases = {
        "starts from an image, and none is given": {
            **i2v,
            "our_out": our_sampler(positive=["text", 0], negative=["no_text", 0]),
        },
        "makes videos from text alone": {**i2v, "ours": t2v["ours"]},
        "the experts are swapped by their names": {**t2v, "ours": swapped},
    }
    for words, graph in cases.items():
        assert words in host.run(keep(graph, "our_out")).expect("error").message, words
