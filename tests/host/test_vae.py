"""VAEs of Wan2.2 and HunyuanVideo-1.5, and diffusers' layouts, in ComfyUI's own nodes: what the engine makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from host.graphs import Graph, keep, node
from lightx2v.vae.layouts import from_diffusers
from lightx2v.vae.loading import VAE
from lightx2v.vae.stream import decode, encode
from tiny_vae import tiny_vae, tiny_vae15, tiny_vae22

pytestmark = pytest.mark.host
TOLERANCE = 1e-4


def published_names(vae: VAE) -> dict[str, str]:
    """Name in the file -> name in the network."""
    return {name: name for name in vae.state_dict()}


def diffusers_names(vae: VAE) -> dict[str, str]:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return {name: from_diffusers(name) for name in AutoencoderKLWan(8).state_dict()}


@pytest.mark.parametrize(
    ("make", "names"), [(tiny_vae22, published_names), (tiny_vae, diffusers_names), (tiny_vae15, published_names)]
)
def test_native_nodes_run_our_network(host, make: Callable[[], VAE], names: Callable[[VAE], Mapping[str, str]]) -> None:
    vae = make()
    weights = vae.state_dict()
    path: Path = host.base / "models" / "vae" / f"tiny_{make.__name__}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weights[original].contiguous().clone() for name, original in names(vae).items()}, path)
    cell = vae.space.stride[1]
    size = {"channels": vae.space.channels, "frames": 3, "height": 96 // cell, "width": 128 // cell}
    graph: Graph = {
        "latent": node("FixtureRandomLatent", seed=4, **size),
        "vae": node("LightX2VLoadVAE", vae_name=path.name),
        "decoded": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "ours": node("LightX2VDecode", latent=["latent", 0], vae=["vae", 0]),
        "encoded": node("VAEEncode", pixels=["decoded", 0], vae=["vae", 0]),
        "tiled": node(
            "VAEDecodeTiled",
            samples=["latent", 0],
            vae=["vae", 0],
            tile_size=512,
            overlap=32,
            temporal_size=64,
            temporal_overlap=8,
        ),
    }
    try:
        result = host.run(keep(graph, "latent", "decoded", "ours", "encoded", "tiled")).expect()
    finally:
        path.unlink()
    raw = result.kept("keep_latent")["samples"]
    frames = decode(vae, raw)
    assert frames.std() > 0.05
    expected = (frames[0].permute(1, 2, 3, 0) + 1) / 2
    for name in ("decoded", "ours", "tiled"):
        torch.testing.assert_close(result.kept(f"keep_{name}"), expected, rtol=0, atol=TOLERANCE)
    encoded = result.kept("keep_encoded")["samples"]
    torch.testing.assert_close(encoded, encode(vae, frames), rtol=0, atol=TOLERANCE * encoded.abs().max().item())


def test_an_empty_latent_of_ti2v_5b(host) -> None:
    graph = {"empty": node("LightX2VEmptyLatent", width=720, height=480, length=50, family="wan2.2_5b", batch_size=1)}
    latent = host.run(keep(graph, "empty")).expect().kept("keep_empty")
    assert latent["samples"].shape == (1, 48, 13, 30, 44)
    assert "made 704x480, 49 frames" in host.log()
