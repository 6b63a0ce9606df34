"""Tiny autoencoders: in chunks as at once, what their files and names tell, and what they refuse."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from closeness import relative_error
from lightx2v.checkpoint import CheckpointError, Header, TensorInfo
from lightx2v.latents import HUNYUAN15, WAN21, WAN22
from lightx2v.vae.layers import State
from lightx2v.vae.loading import identify_vae, load_vae
from lightx2v.vae.stream import decode, encode
from lightx2v.vae.tae import KINDS, TAEConfig, TinyVAE, config_from_header
from tiny_vae import tiny_tae

MANIFESTS = Path(__file__).parents[1] / "formats" / "manifests"
NARROW = (12, 10, 8, 6)
PUBLISHED = {
    "taew2_1": (WAN21, "taew2_1.json.gz"),
    "lighttaew2_1": (WAN21, "taew2_1.json.gz"),
    "taew2_2": (WAN22, "taew2_2.json.gz"),
    "lighttaew2_2": (WAN22, "taew2_2.json.gz"),
    "taehv1_5": (HUNYUAN15, "taehv1_5.json.gz"),
    "lighttaehy1_5": (HUNYUAN15, "lightx2v_lighttaehy1_5.json.gz"),
}


def header_named(name: str, manifest: str = "taew2_1.json.gz") -> Header:
    tensors = json.loads(gzip.decompress((MANIFESTS / manifest).read_bytes()))["tensors"]
    path = Path("models/vae_approx") / name
    return Header(path, {key: TensorInfo(torch.float16, tuple(t["shape"]), path) for key, t in tensors.items()}, {})


def written(path: Path, tae: TinyVAE, **more: Tensor) -> Path:
    weights = {name: tensor.clone() for name, tensor in tae.state_dict().items()} | more
    if path.suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    return path


@pytest.mark.parametrize("kind", ["taew2_1", "lighttaew2_2"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_decoding_in_chunks_is_decoding_at_once(kind: str, chunk: int) -> None:
    tae = tiny_tae(kind, NARROW)
    raw = torch.randn(2, tae.space.channels, 7, 3, 4)
    whole = tae.reconstruct(raw)
    assert whole.shape[2] == 25 and (whole[:, :, 1:] - whole[:, :, :-1]).abs().mean() > 0.01
    assert relative_error(decode(tae, raw, chunk=chunk, clamp=False), whole) < 1e-6


@pytest.mark.parametrize("chunk", [4, 8])
def test_encoding_in_chunks_is_encoding_at_once(chunk: int) -> None:
    tae = tiny_tae("taew2_1", NARROW)
    frames = torch.rand(2, 3, 13, 16, 24) * 2 - 1
    seen: list[tuple[int, int]] = []
    latents = encode(tae, frames, chunk=chunk, on_chunk=lambda done, total: seen.append((done, total)))
    assert latents.shape == (2, 16, 4, 2, 3) and seen[-1] == (4, 4)
    assert relative_error(latents, tae.to_latents(frames)) < 1e-6


def test_what_is_remembered_does_not_grow() -> None:
    tae, sizes = tiny_tae("taew2_1", NARROW), []
    state: State = {}
    for _ in range(4):
        tae.reconstruct(torch.randn(1, 16, 1, 2, 3), state)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in state.values()))
    assert sizes[0] > 0 and len(set(sizes)) == 1


def test_raw_or_normalised_latents() -> None:
    """The same weights under both names: each gets the latents that it was trained on."""
    normalised, raw = tiny_tae("taew2_1", NARROW), tiny_tae("lighttaew2_1", NARROW)
    latents = torch.randn(1, 16, 2, 2, 3)
    assert relative_error(decode(normalised, WAN21.denormalize(latents)), decode(raw, latents)) < 1e-5
    frames = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert relative_error(encode(normalised, frames), WAN21.denormalize(encode(raw, frames))) < 1e-5


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_published_files_are_told_by_name(kind: str, suffix: str) -> None:
    space, manifest = PUBLISHED[kind]
    header = header_named(f"{kind}.{suffix}", manifest)
    config = config_from_header(header)
    assert config == TAEConfig(kind) and KINDS[kind].space is space
    with torch.device("meta"):
        names = {name: tuple(tensor.shape) for name, tensor in TinyVAE(config).state_dict().items()}
    assert names == {name: info.shape for name, info in header.tensors.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TAEW2.1.safetensors", "taew2_1"),
        ("my-LightTAE-w2_1-bf16.safetensors", "lighttaew2_1"),
        ("taew2_1_demo.safetensors", "taew2_1"),
    ],
)
def test_other_ways_to_write_a_name(name: str, kind: str) -> None:
    assert config_from_header(header_named(name)).kind == kind


@pytest.mark.parametrize(
    ("name", "manifest", "complaint"),
    [
        (
            "tiny.safetensors",
            "taew2_1.json.gz",
            "tensors fit taew2_1 and lighttaew2_1, which expect different latents",
        ),
        ("taew2_1.safetensors", "taew2_2.json.gz", "fit taew2_2 and lighttaew2_2"),
        ("taehv.pth", "taew2_1.json.gz", "a tiny autoencoder of another model"),
    ],
)
def test_a_name_that_does_not_tell_is_refused(name: str, manifest: str, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*{complaint}"):
        config_from_header(header_named(name, manifest))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_door_loads_them(tmp_path: Path, suffix: str) -> None:
    tae = tiny_tae("lighttaew2_2", NARROW)
    info = identify_vae(written(tmp_path / f"lighttaew2_2.{suffix}", tae), WAN22)
    assert info.tiny and info.name == "tiny autoencoder lighttaew2_2" and info.config == tae.config
    loaded = load_vae(info, dtype=torch.float32, device="cpu")
    raw = torch.randn(1, 48, 2, 2, 2)
    assert torch.equal(decode(loaded, raw), decode(tae, raw))


def test_another_latent_space_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "taew2_2.safetensors", tiny_tae("taew2_2", NARROW))
    with pytest.raises(
        CheckpointError, match="this is a tiny autoencoder taew2_2, with 48 latent channels; the model has 16"
    ):
        identify_vae(path, WAN21)


def test_kernels_for_more_frames_are_cut_to_the_last(tmp_path: Path) -> None:
    """Files whose first doubling could also make two frames of one: taehv keeps the second."""
    tae = tiny_tae("taew2_1", NARROW)
    kernel = tae.decoder[7].conv.weight
    path = written(tmp_path / "taew2_1.safetensors", tae, **{"decoder.7.conv.weight": torch.cat([kernel + 1, kernel])})
    raw = torch.randn(1, 16, 2, 2, 3)
    assert torch.equal(decode(load_vae(identify_vae(path), dtype=torch.float32, device="cpu"), raw), decode(tae, raw))


def test_decoders_alone_say_that_they_cannot_encode(tmp_path: Path) -> None:
    frames = torch.zeros(1, 3, 5, 16, 16)
    alone = TinyVAE(TAEConfig("taew2_1", NARROW, None))
    loaded = load_vae(identify_vae(written(tmp_path / "taew2_1.pth", alone)), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="cannot encode: the file has no encoder"):
        encode(loaded, frames)
    with pytest.raises(ValueError, match="cannot encode: lighttaehy1_5 is published as a decoder"):
        encode(tiny_tae("lighttaehy1_5", NARROW), frames)


def test_a_damaged_file_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    tae = tiny_tae("taew2_1", NARROW)
    weights = {name: tensor.clone() for name, tensor in tae.state_dict().items() if name != "decoder.16.conv.2.bias"}
    save_file(weights, tmp_path / "taew2_1.safetensors")
    info = identify_vae(tmp_path / "taew2_1.safetensors")
    with pytest.raises(CheckpointError, match=r"taew2_1.safetensors: 1 of \d+ tensors are missing.*decoder.16.conv.2"):
        load_vae(info, dtype=torch.float32, device="cpu")
