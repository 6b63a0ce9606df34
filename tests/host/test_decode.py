"""Decode, with the VAEs of this pack and ComfyUI's own: whole, in tiles, and what happens when memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from host.graphs import Graph, keep, node, our_sampler
from host.graphs import base as base_graph
from lightx2v.vae.stream import decode, encode
from lightx2v.vae.tiling import Tiling, decode_tiled
from tiny_vae import tiny_tae, tiny_vae

pytestmark = pytest.mark.host
TOLERANCE = 1e-4
NARROW = (12, 10, 8, 6)
TILES = {"tile_size": 64, "overlap": 16}
OUR_TILES = Tiling(64, 16)
DEMO_TAE = "lightx2v-demo/variants/taew2_1_demo.safetensors"


def save(path: Path, network: nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def names(host) -> Iterator[dict[str, str]]:
    """Which name of which loader: a VAE, and tiny autoencoders in both folders."""
    models = host.base / "models"
    paths = [
        save(models / "vae" / "cramped_wan2.1_vae.safetensors", tiny_vae()),
        save(models / "vae_approx" / "taew2_1.safetensors", tiny_tae("taew2_1", NARROW)),
        save(models / "vae" / "lighttaew2_2.safetensors", tiny_tae("lighttaew2_2", NARROW)),
    ]
    yield {"vae": paths[0].name, "taew2_1": f"vae_approx/{paths[1].name}", "lighttaew2_2": paths[2].name}
    for path in paths:
        path.unlink()


def pictures(video: Tensor) -> Tensor:
    """(1, 3, F, H, W) in [-1, 1] as the IMAGE (F, H, W, 3) in [0, 1]."""
    return (video[0].permute(1, 2, 3, 0) + 1) / 2


def in_tiles(raw: Tensor, *, blended_first: bool = True) -> Tensor:
    """What the engine makes of latents in tiles. ComfyUI's own VAEs clamp each tile, before they are blended."""
    vae = tiny_vae()
    made = decode_tiled(lambda part: decode(vae, part, clamp=not blended_first), raw, (4, 8, 8), OUR_TILES)
    return pictures(made.clamp(-1, 1))


def base(vae: str, loader: str = "LightX2VLoadVAE", channels: int = 16, height: int = 12, width: int = 20) -> Graph:
    size = {"channels": channels, "frames": 3, "height": height, "width": width}
    return {"latent": node("FixtureRandomLatent", seed=4, **size), "vae": node(loader, vae_name=vae)}


def ours(vae: str = "vae", **options: object) -> dict:
    return node("LightX2VDecode", latent=["latent", 0], vae=[vae, 0], **options)


def test_tiny_autoencoders_are_listed_and_recognised(host, names: dict[str, str]) -> None:
    listed = host.get("/object_info/LightX2VLoadVAE")["LightX2VLoadVAE"]["input"]["required"]["vae_name"]
    options = listed[1]["options"] if isinstance(listed[0], str) else listed[0]
    assert {*names.values(), DEMO_TAE} <= set(options)
    assert len(set(options)) == len(options)


@pytest.mark.parametrize("kind", ["taew2_1", "lighttaew2_2"])
def test_tiny_autoencoders_in_native_nodes(host, names: dict[str, str], kind: str) -> None:
    tae = tiny_tae(kind, NARROW)
    cell = tae.space.stride[1]
    graph = {
        **base(names[kind], channels=tae.space.channels, height=96 // cell, width=128 // cell),
        "native": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "ours": ours(),
        "encoded": node("VAEEncode", pixels=["native", 0], vae=["vae", 0]),
    }
    result = host.run(keep(graph, "latent", "native", "ours", "encoded")).expect()
    frames = decode(tae, result.kept("keep_latent")["samples"])
    for name in ("native", "ours"):
        torch.testing.assert_close(result.kept(f"keep_{name}"), pictures(frames), rtol=0, atol=TOLERANCE)
    encoded = result.kept("keep_encoded")["samples"]
    torch.testing.assert_close(encoded, encode(tae, frames), rtol=0, atol=TOLERANCE * encoded.abs().max().item())


@pytest.mark.parametrize("loader", ["LightX2VLoadVAE", "VAELoader"])
def test_whole_and_in_tiles(host, names: dict[str, str], loader: str) -> None:
    graph = {
        **base(names["vae"], loader),
        "auto": ours(),
        "full": ours(mode="full", **TILES),
        "tiled": ours(mode="tiled", **TILES),
    }
    result = host.run(keep(graph, "latent", "auto", "full", "tiled")).expect()
    vae, raw = tiny_vae(), result.kept("keep_latent")["samples"]
    whole = pictures(decode(vae, raw))
    tiled = in_tiles(raw, blended_first=loader == "LightX2VLoadVAE")
    for name in ("auto", "full"):
        torch.testing.assert_close(result.kept(f"keep_{name}"), whole, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(result.kept("keep_tiled"), tiled, rtol=0, atol=TOLERANCE)
    assert (tiled - whole).abs().mean() > 0.01, "random weights show every tile"


@pytest.mark.parametrize("loader", ["LightX2VLoadVAE", "VAELoader"])
def test_auto_takes_tiles_where_memory_is_short(host, names: dict[str, str], loader: str) -> None:
    graph = {
        **base(names["vae"], loader),
        "hungry": node("FixtureCrampedVae", vae_in=["vae", 0], says=True, columns=1000),
        "auto": ours("hungry", **TILES),
        "full": ours("hungry", mode="full", **TILES),
    }
    result = host.run(keep(graph, "latent", "auto", "full")).expect()
    assert "Decoding in tiles: whole frames take 1000000.0 GB" in host.log()
    vae, raw = tiny_vae(), result.kept("keep_latent")["samples"]
    tiled = in_tiles(raw, blended_first=loader == "LightX2VLoadVAE")
    torch.testing.assert_close(result.kept("keep_auto"), tiled, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(result.kept("keep_full"), pictures(decode(vae, raw)), rtol=0, atol=TOLERANCE)


def test_tiles_once_memory_has_run_out(host, names: dict[str, str]) -> None:
    graph = {
        **base(names["vae"]),
        "cramped": node("FixtureCrampedVae", vae_in=["vae", 0], says=False, columns=8),
        "auto": ours("cramped", **TILES),
    }
    result = host.run(keep(graph, "latent", "auto")).expect()
    assert "Too little GPU memory to decode whole frames; decoding in tiles" in host.log()
    tiled = in_tiles(result.kept("keep_latent")["samples"])
    torch.testing.assert_close(result.kept("keep_auto"), tiled, rtol=0, atol=TOLERANCE)
    graph["auto"] = ours("cramped", mode="full", **TILES)
    assert "the fixture's" in host.run(keep(graph, "auto")).expect("error").message


def test_smaller_tiles_once_memory_has_run_out_for_tiles(host, names: dict[str, str]) -> None:
    graph = {
        **base(names["vae"], width=40),
        "cramped": node("FixtureCrampedVae", vae_in=["vae", 0], says=True, columns=24),
        "auto": ours("cramped", tile_size=256, overlap=64),
        "report": node("LightX2VReport", latent=["auto", 1]),
    }
    result = host.run(keep(graph, "auto")).expect()
    assert "Too little GPU memory for tiles of 256 pixels; taking 192" in host.log()
    assert "decoded tiles of 192 pixels" in result.text("report")
    graph["auto"] = ours("cramped", mode="tiled", tile_size=256, overlap=64)
    message = host.run(keep(graph, "auto")).expect("error").message
    assert (
        "ran out while decoding in tiles of 256 pixels (the fixture's): set mode to tiled and tile_size to 128"
        in message
    )


def test_tiles_that_make_no_sense_are_refused(host, names: dict[str, str]) -> None:
    graph = {**base(names["vae"]), "bad": ours(mode="tiled", tile_size=64, overlap=64)}
    message = host.run(keep(graph, "bad")).expect("error").message
    assert "tiles of 64 pixels overlap by 64: expected at most half" in message


@pytest.mark.parametrize("frames", [6, 8, 9])
def test_frames_beyond_4n_1_are_left_out(host, names: dict[str, str], frames: int) -> None:
    """As ComfyUI's own VAE does; its image-to-video nodes count on it."""
    graph = {
        "picture": node("FixturePicture", seed=1, frames=frames, height=32, width=48),
        "vae": node("LightX2VLoadVAE", vae_name=names["vae"]),
        "native_vae": node("VAELoader", vae_name=names["vae"]),
        "ours": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "native": node("VAEEncode", pixels=["picture", 0], vae=["native_vae", 0]),
    }
    result = host.run(keep(graph, "ours", "native")).expect()
    here, there = (result.kept(f"keep_{name}")["samples"] for name in ("ours", "native"))
    assert here.shape[2] == (frames - 1) // 4 + 1
    torch.testing.assert_close(here, there, rtol=0, atol=TOLERANCE * float(there.abs().max()))


def previews(host, models, method: str, run: int) -> list[bytes]:
    """Of two steps with a preview method; back to "latent2rgb" after."""
    graph = base_graph(models)
    graph |= {
        "start": node("FixturePreviewMethod", latent_in=["empty", 0], method=method, run=run),
        "sample": our_sampler("start", steps=2, seed=11),
        "after": node("FixturePreviewMethod", latent_in=["sample", 0], method="latent2rgb", run=run),
    }
    result = host.run(keep(graph, "after")).expect()
    shown = [preview.image for preview in result.previews if preview.node == "sample"]
    assert len(shown) == 2 and all(picture.format == "PNG" and picture.n_frames == 5 for picture in shown)
    return [picture.convert("RGB").tobytes() for picture in shown]


def test_previews_by_a_tiny_autoencoder(host, tiny_models, names: dict[str, str]) -> None:
    colours = previews(host, tiny_models, "latent2rgb", 1)
    tiny = previews(host, tiny_models, "taesd", 2)
    assert colours != tiny
    path = host.base / "models" / "vae_approx" / "taew2_1.safetensors"
    path.rename(path.with_suffix(".away"))
    try:
        assert previews(host, tiny_models, "taesd", 3) == colours
    finally:
        path.with_suffix(".away").rename(path)
    assert "models/vae_approx has no tiny autoencoder of this model's latents; showing colours" in host.log()
