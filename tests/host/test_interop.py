"""The pack's LATENT and CONDITIONING against ComfyUI's own, both ways, through a real server."""

import pytest
import torch
from torch import Tensor

from host.graphs import Graph, base, keep, native_sampler, node, our_sampler, random_latent

pytestmark = pytest.mark.host
TOLERANCE = 1e-4


def samples(result, name: str) -> Tensor:
    return result.kept(f"keep_{name}")["samples"]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float32
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < TOLERANCE


def test_same_seed_same_latents_and_half_and_half(host, tiny_models) -> None:
    graph = {
        **base(tiny_models),
        "all_native": native_sampler(),
        "all_ours": our_sampler(),
        "first_native": native_sampler(end=3),
        "then_ours": our_sampler("first_native", start_at_step=3, add_noise=False),
        "first_ours": our_sampler(end_at_step=3),
        "then_native": native_sampler("first_ours", start=3),
    }
    names = ("all_native", "all_ours", "first_native", "then_ours", "first_ours", "then_native")
    result = host.run(keep(graph, *names)).expect()
    expected = samples(result, "all_native")
    for name in ("all_ours", "then_ours", "then_native"):
        assert_same(samples(result, name), expected)
    assert_same(samples(result, "first_ours"), samples(result, "first_native"))
    assert (samples(result, "first_ours") - expected).abs().max() > 0.1


@pytest.mark.parametrize("change", ["cfg", "batch", "noise", "short_text", "mask", "other_empty"])
def test_variations_agree(host, tiny_models, change: str) -> None:
    graph: Graph = base(tiny_models)
    native, ours = native_sampler(), our_sampler()
    if change == "cfg":
        native, ours = native_sampler(cfg=1.0), our_sampler(cfg=1.0)
    elif change == "batch":
        graph["empty"]["inputs"]["batch_size"] = 2
    elif change == "noise":
        graph["empty"] = random_latent()
        native, ours = native_sampler(start=2, add_noise="enable"), our_sampler(start_at_step=2)
    elif change == "short_text":
        graph["positive"]["inputs"]["tokens"] = 77
    elif change == "mask":
        graph["clean"] = random_latent()
        graph["half"] = node("SolidMask", value=0.0, width=128, height=96)
        graph["whole"] = node("SolidMask", value=1.0, width=64, height=96)
        graph["cut"] = node("MaskComposite", destination=["half", 0], source=["whole", 0], x=0, y=0, operation="add")
        graph["empty"] = node("SetLatentNoiseMask", samples=["clean", 0], mask=["cut", 0])
    elif change == "other_empty":
        graph["empty"] = node("EmptyHunyuanLatentVideo", width=128, height=96, length=17, batch_size=1)
    graph |= {"native_out": native, "our_out": ours}
    result = host.run(keep(graph, "native_out", "our_out")).expect()
    assert_same(samples(result, "our_out"), samples(result, "native_out"))


def test_other_keys_of_a_latent_survive(host, tiny_models) -> None:
    graph = {**base(tiny_models), "empty": random_latent(), "out": our_sampler(steps=1, cfg=1.0)}
    assert host.run(keep(graph, "out")).expect().kept("keep_out")["fixture_note"] == "keep me"


def test_text_conditioning_is_native_and_drives_both_samplers(host, tiny_models) -> None:
    graph = {
        **base(tiny_models),
        "clip": node("FixtureUmt5Clip", file=tiny_models.text_encoder, tokenizer=""),
        "encoder": node("LightX2VLoadTextEncoder", text_encoder=tiny_models.text_encoder),
    }
    prompts = {
        "one": "a red circle moves to the right over a blue background",
        "empty_text": "",
        "long": "a cat " * 600,
    }
    for name, text in prompts.items():
        graph[f"native_{name}"] = node("CLIPTextEncode", clip=["clip", 0], text=text)
        graph[f"ours_{name}"] = node("LightX2VTextEncode", encoder=["encoder", 0], text=text)
    for side, other in (("native", "ours"), ("ours", "native")):
        links = {"positive": [f"{side}_one", 0], "negative": [f"{side}_empty_text", 0]}
        graph[f"{other}_sampler_{side}_text"] = native_sampler(**links) if other == "native" else our_sampler(**links)
    kept = [f"{side}_{name}" for side in ("native", "ours") for name in prompts]
    result = host.run(keep(graph, *kept, "native_sampler_ours_text", "ours_sampler_native_text")).expect()
    for name in prompts:
        ((native, native_extras),), ((ours, our_extras),) = (
            result.kept(f"keep_{side}_{name}") for side in ("native", "ours")
        )
        assert our_extras == native_extras == {"pooled_output": None}
        assert ours.shape == native.shape
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5)
        assert torch.equal((ours == 0).all(-1), (native == 0).all(-1)), "padding rows are exactly zero on both sides"
    assert_same(samples(result, "native_sampler_ours_text"), samples(result, "ours_sampler_native_text"))


def test_vae_objects_and_decoders_are_interchangeable(host, tiny_models) -> None:
    graph = {
        "latent": random_latent(),
        "native_vae": node("VAELoader", vae_name=tiny_models.vae),
        "our_vae": node("LightX2VLoadVAE", vae_name=tiny_models.vae),
    }
    for vae in ("native_vae", "our_vae"):
        graph[f"{vae}_decoded"] = node("VAEDecode", samples=["latent", 0], vae=[vae, 0])
        graph[f"{vae}_ours"] = node("LightX2VDecode", latent=["latent", 0], vae=[vae, 0])
        graph[f"{vae}_encoded"] = node("VAEEncode", pixels=["native_vae_decoded", 0], vae=[vae, 0])
        tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
        graph[f"{vae}_tiled"] = node("VAEDecodeTiled", samples=["latent", 0], vae=[vae, 0], **tiles)
    kept = [f"{vae}_{what}" for vae in ("native_vae", "our_vae") for what in ("decoded", "ours", "encoded", "tiled")]
    result = host.run(keep(graph, *kept)).expect()
    frames = result.kept("keep_native_vae_decoded")
    assert frames.shape == (17, 96, 128, 3)
    assert frames.std() > 0.01
    for name in ("native_vae_ours", "our_vae_decoded", "our_vae_ours"):
        torch.testing.assert_close(result.kept(f"keep_{name}"), frames, rtol=0, atol=TOLERANCE)
    tiled = result.kept("keep_native_vae_tiled")
    torch.testing.assert_close(result.kept("keep_our_vae_tiled"), tiled, rtol=0, atol=TOLERANCE)
    assert_same(samples(result, "our_vae_encoded"), samples(result, "native_vae_encoded"))
