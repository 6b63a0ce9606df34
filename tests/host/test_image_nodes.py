"""Image Encode and Image To Video beside ComfyUI's own nodes, through a real server: each side takes the other's."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny_clip
from host.graphs import Graph, keep, node
from tiny_vae import tiny_vae22

pytestmark = pytest.mark.host

SIZE = {"width": 128, "height": 96, "length": 17, "batch_size": 2}
OURS, START_ONLY, FIRST_LAST = "LightX2VImageToVideo", "WanImageToVideo", "WanFirstLastFrameToVideo"


@pytest.fixture(scope="module")
def encoder(host) -> str:
    """A small image encoder among the server's files; values that float16 holds, as ComfyUI keeps them."""
    state = tiny_clip.state_dict()
    path = host.base / "models" / "clip_vision" / "tiny_clip.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, path)
    return path.name


def base(tiny_models, encoder: str) -> Graph:
    return {
        "positive": node("FixtureWanConditioning", seed=1, tokens=8),
        "negative": node("FixtureWanConditioning", seed=2, tokens=8),
        "native_vae": node("VAELoader", vae_name=tiny_models.vae),
        "our_vae": node("LightX2VLoadVAE", vae_name=tiny_models.vae),
        "first": node("FixturePicture", seed=1, frames=1, height=90, width=160),
        "last": node("FixturePicture", seed=2, frames=1, height=161, width=97),
        "ours": node("LightX2VLoadImageEncoder", image_encoder=encoder),
        "native": node("FixtureClipVision", file=encoder),
        "features": node("LightX2VImageEncode", encoder=["ours", 0], image=["first", 0], crop="none"),
        "native_features": node("CLIPVisionEncode", clip_vision=["native", 0], image=["last", 0], crop="none"),
    }


def to_video(kind: str, vae: str = "native_vae", **given: str | int) -> dict[str, Any]:
    links = {name: [value, 0] if isinstance(value, str) else value for name, value in given.items()}
    return node(kind, positive=["positive", 0], negative=["negative", 0], vae=[vae, 0], **{**SIZE, **links})


def outputs(host, graph: Graph, *names: str) -> dict[str, tuple[dict, dict, dict]]:
    """What each of these nodes wrote into positive and negative, and its latent."""
    keeps = {f"keep_{name}_{index}": node("FixtureKeep", value=[name, index]) for name in names for index in range(3)}
    result = host.run({**graph, **keeps}).expect()
    found = {}
    for name in names:
        ((_, positive),), ((_, negative),) = (result.kept(f"keep_{name}_{index}") for index in range(2))
        found[name] = (positive, negative, result.kept(f"keep_{name}_2"))
    return found


def assert_same(ours: Any, native: Any, path: str = "", tolerance: float = 1e-5) -> None:
    assert type(ours) is type(native), path
    if isinstance(native, dict):
        assert ours.keys() == native.keys(), path
        for key in native:
            assert_same(ours[key], native[key], f"{path}.{key}", tolerance)
    elif isinstance(native, torch.Tensor):
        assert ours.shape == native.shape and ours.dtype == native.dtype, path
        assert (ours - native).abs().max() <= tolerance * max(1, float(native.abs().max())), path
    else:
        assert ours == native, path


CASES = {
    "start": (START_ONLY, {"start_image": "first"}, {}),
    "start and features": (START_ONLY, {"start_image": "first"}, {"clip_vision_start_image": "features"}),
    "features of CLIPVisionEncode": (START_ONLY, {}, {"clip_vision_start_image": "native_features"}),
    "nothing": (START_ONLY, {}, {}),
    "start and end": (FIRST_LAST, {"start_image": "first", "end_image": "last"}, {}),
    "end": (FIRST_LAST, {"end_image": "last"}, {}),
    "both features": (
        FIRST_LAST,
        {"start_image": "first", "end_image": "last"},
        {"clip_vision_start_image": "features", "clip_vision_end_image": "native_features"},
    ),
    "features of the end": (FIRST_LAST, {"end_image": "last"}, {"clip_vision_end_image": "features"}),
}


@pytest.mark.parametrize("vae", ["native_vae", "our_vae"])
@pytest.mark.parametrize("case", CASES)
def test_writes_what_comfyui_writes(host, tiny_models, encoder, case: str, vae: str) -> None:
    kind, images, features = CASES[case]
    theirs = features
    if features and kind == START_ONLY:
        theirs = {"clip_vision_output": features["clip_vision_start_image"]}
    graph = {
        **base(tiny_models, encoder),
        "their_node": to_video(kind, **images, **theirs),
        "our_node": to_video(OURS, vae, **images, **features),
    }
    found = outputs(host, graph, "their_node", "our_node")
    for part in range(3):
        assert_same(found["our_node"][part], found["their_node"][part], f"output {part}")
    positive, _, latent = found["our_node"]
    expected = {"pooled_output"} | ({"concat_latent_image", "concat_mask"} if images else set())
    assert set(positive) == expected | ({"clip_vision_output"} if features else set())
    assert latent["samples"].shape == (2, 16, 5, 12, 16) and not latent["samples"].any()
    if images:
        assert positive["concat_latent_image"].std() > 0.1
    if len(features) == 2:
        assert positive["clip_vision_output"]["penultimate_hidden_states"].shape == (1, 34, 160)


def test_without_memory_for_the_clip_it_is_encoded_otherwise(host, tiny_models, encoder) -> None:
    graph = base(tiny_models, encoder)
    graph["tight"] = node("FixtureTightVae", vae_in=["our_vae", 0])
    graph["first"]["inputs"]["seed"] = 9
    graph |= {kind: to_video(kind, start_image="first") for kind in (START_ONLY,)}
    graph[OURS] = to_video(OURS, "tight", start_image="first")
    found = outputs(host, graph, START_ONLY, OURS)
    assert_same(found[OURS][0], found[START_ONLY][0])
    assert "Too little GPU memory to encode 17 frames at once" in host.log()


@pytest.mark.parametrize("frames", [1, 5, 7])
def test_several_start_frames(host, tiny_models, encoder, frames: int) -> None:
    graph = base(tiny_models, encoder)
    graph["first"]["inputs"]["frames"] = frames
    graph |= {kind: to_video(kind, start_image="first") for kind in (START_ONLY, OURS)}
    found = outputs(host, graph, START_ONLY, OURS)
    for part in range(3):
        assert_same(found[OURS][part], found[START_ONLY][part])
    (mask,) = found[OURS][0]["concat_mask"][:, 0, :, 0, 0]
    assert mask.tolist() == ([0, 1, 1, 1, 1] if frames < 5 else [0, 0, 1, 1, 1])


@pytest.fixture(scope="module")
def vae22(host) -> str:
    """A narrow Wan2.2 VAE, which only this pack's loader takes."""
    path = host.base / "models" / "vae" / "tiny_vae22_of_pictures.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tiny_vae22().state_dict(), path)
    return path.name


@pytest.mark.parametrize(("frames", "ours"), [(0, False), (1, False), (6, False), (1, True), (5, True)])
def test_ti2v_latent_is_comfyuis(host, tiny_models, encoder, vae22, frames: int, ours: bool) -> None:
    graph = base(tiny_models, encoder)
    graph["vae48"] = node("LightX2VLoadVAE", vae_name=vae22) if ours else node("FixtureCellVae")
    images = {"start_image": "first"} if frames else {}
    graph["first"]["inputs"]["frames"] = max(frames, 1)
    graph["their_node"] = node(
        "Wan22ImageToVideoLatent", vae=["vae48", 0], **SIZE, **{name: [value, 0] for name, value in images.items()}
    )
    graph["our_node"] = to_video(OURS, "vae48", **images)
    if not frames:
        graph["their_node"]["inputs"]["batch_size"] = graph["our_node"]["inputs"]["batch_size"] = 1
    graph["keep_their_node"] = node("FixtureKeep", value=["their_node", 0])
    graph["keep_our_node"] = node("FixtureKeep", value=["our_node", 2])
    graph["keep_positive"] = node("FixtureKeep", value=["our_node", 0])
    result = host.run(graph).expect()
    latent = result.kept("keep_our_node")
    assert_same(latent, result.kept("keep_their_node"))
    assert set(latent) == ({"samples", "noise_mask"} if frames else {"samples"})
    ((_, extras),) = result.kept("keep_positive")
    assert set(extras) == {"pooled_output"}


@pytest.mark.parametrize("crop", ["none", "center"])
def test_features_are_those_of_clip_vision_encode(host, tiny_models, encoder, crop: str) -> None:
    graph = base(tiny_models, encoder)
    graph["theirs"] = node("CLIPVisionEncode", clip_vision=["native", 0], image=["first", 0], crop=crop)
    our_node = {"encoder": ["ours", 0], "image": ["first", 0], "crop": crop}
    graph["same"] = node("LightX2VImageEncode", **our_node, resize="comfyui")
    graph["wan"] = node("LightX2VImageEncode", **our_node)
    result = host.run(keep(graph, "theirs", "same", "wan")).expect()
    theirs, same, wan = (result.kept(f"keep_{name}") for name in ("theirs", "same", "wan"))
    theirs.pop("image_sizes", None)  # of newer hosts, for encoders without a fixed picture size
    assert set(theirs) == {"last_hidden_state", "penultimate_hidden_states", "image_embeds", "mm_projected"}
    assert_same(same, theirs)
    assert wan["penultimate_hidden_states"].shape == (1, 17, 160)
    assert (wan["penultimate_hidden_states"] - same["penultimate_hidden_states"]).abs().max() > 0.01
    assert ("same", 3, 4) in result.progress


def test_the_encoder_is_listed_and_nothing_else(host, encoder) -> None:
    folder = host.base / "models" / "clip_vision"
    save_file({"vision_model.head.probe": torch.zeros(1, 1, 1152)}, folder / "siglip.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no such thing")
    try:
        described = host.get("/object_info/LightX2VLoadImageEncoder")["LightX2VLoadImageEncoder"]
    finally:
        (folder / "siglip.safetensors").unlink()
        (folder / "broken.safetensors").unlink()
    kind, extra = described["input"]["required"]["image_encoder"]
    assert (extra["options"] if kind == "COMBO" else kind) == [encoder]


def test_comfyui_counts_its_bytes_and_can_free_it(host, tiny_models, encoder) -> None:
    graph = keep(base(tiny_models, encoder), "features")
    graph["features"]["inputs"]["crop"] = "center"
    graph["loaded"] = node("FixtureLoadedModels", after=["features", 0])
    size = sum(tensor.numel() * 2 for tensor in tiny_clip.state_dict().values() if tensor.is_floating_point())
    mine = f'"EngineHandle", "module": "Housed", "bytes": {size}'
    assert mine in host.run(graph).expect().text("loaded")

    host.post("/free", {"unload_models": True})
    held = {"ours": graph["ours"], "loaded": node("FixtureLoadedModels", after=["ours", 0])}
    deadline = time.monotonic() + 20  # the server obeys between two graphs
    while mine in host.run(held).expect().text("loaded"):
        assert time.monotonic() < deadline, "still loaded"


def test_sizes_are_snapped_to_what_the_model_can_make(host, tiny_models, encoder) -> None:
    graph = base(tiny_models, encoder) | {"vae48": node("FixtureCellVae")}
    graph["small"] = to_video(OURS, start_image="first", width=112, height=80, length=15)
    graph["five"] = to_video(OURS, "vae48", start_image="first", width=112, height=80)
    found = outputs(host, graph, "small", "five")
    assert found["small"][2]["samples"].shape == (2, 16, 5, 10, 14)
    assert found["five"][2]["samples"].shape == (2, 48, 5, 4, 6)
    assert "made 112x80, 17 frames" in host.log() and "made 96x64, 17 frames" in host.log()


def test_bad_input_is_said_in_words(host, tiny_models, encoder) -> None:
    graph = base(tiny_models, encoder) | {"vae48": node("FixtureCellVae")}
    middle = node("LightX2VImageEncode", encoder=["ours", 0], image=["first", 0], crop="middle")
    cases = {
        ("TI2V-5B takes a start image only",): to_video(OURS, "vae48", start_image="first", end_image="last"),
        # Newer hosts compare with a node's list themselves.
        ("crop='middle' is not one of none, center", "crop: 'middle' not in ['none', 'center']"): middle,
        ("gone.safetensors",): node("LightX2VLoadImageEncoder", image_encoder="gone.safetensors"),
    }
    for words, bad in cases.items():
        result = host.run(keep({**graph, "bad": bad}, "bad"))
        assert result.status in ("rejected", "error"), result.status
        assert any(each in result.message for each in words), result.message
