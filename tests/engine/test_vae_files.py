"""Files of VAEs: layouts, widths, what else is picked by mistake, and whose latents they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from closeness import relative_error
from lightx2v.checkpoint import CheckpointError, Header, TensorInfo
from lightx2v.latents import WAN21, WAN22, LatentFormat
from lightx2v.vae import hunyuan15, wan, wan22
from lightx2v.vae.layouts import from_diffusers, from_diffusers22
from lightx2v.vae.loading import VAE, identify_vae, load_vae
from lightx2v.vae.stream import decode, encode
from tiny_vae import tiny_vae, tiny_vae15, tiny_vae22

MANIFESTS = Path(__file__).parents[1] / "formats" / "manifests"
MAKERS: dict[str, Callable[[], VAE]] = {
    "wan2.1": tiny_vae,
    "wan2.1 wider": partial(tiny_vae, 12),
    "wan2.2": tiny_vae22,
    "wan2.2 wider": partial(tiny_vae22, 12, 8),
    "hunyuan1.5": tiny_vae15,
    "hunyuan1.5 wider": partial(tiny_vae15, (32, 64, 128, 128, 128)),
}


def random_latents(vae: VAE) -> torch.Tensor:
    return torch.randn(1, vae.space.channels, 2, 2, 3)


def diffusers_names(vae: VAE) -> dict[str, str]:
    """Name in diffusers' own network -> name in the original."""
    from diffusers import AutoencoderKLHunyuanVideo15, AutoencoderKLWan

    with torch.device("meta"):
        if isinstance(vae, hunyuan15.HunyuanVAE):
            theirs = AutoencoderKLHunyuanVideo15(block_out_channels=vae.config.widths)
            return {name: hunyuan15.from_diffusers(name) for name in theirs.state_dict()}
        if isinstance(vae, wan.WanVAE):
            return {name: from_diffusers(name) for name in AutoencoderKLWan(vae.config.base_channels).state_dict()}
        widths = {"base_dim": vae.config.encoder_channels, "decoder_base_dim": vae.config.decoder_channels}
        patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2}
        network = AutoencoderKLWan(**widths, **patches, z_dim=48, is_residual=True)
    return {name: from_diffusers22(name) for name in network.state_dict()}


def written(folder: Path, layout: str, vae: VAE) -> Path:
    """The VAE as one file: 'pth', 'safetensors', 'prefixed', 'diffusers', or as diffusers' folder 'vae'."""
    weights = {name: t.clone(memory_format=torch.contiguous_format) for name, t in vae.state_dict().items()}
    path = folder / f"vae.{'pth' if layout == 'pth' else 'safetensors'}"
    if layout == "pth":
        torch.save(weights, path)
    elif layout in ("diffusers", "folder"):
        if layout == "folder":
            (folder / "vae").mkdir()
            path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        save_file({name: weights[original] for name, original in diffusers_names(vae).items()}, path)
    else:
        save_file({f"vae.{name}" if layout == "prefixed" else name: weights[name] for name in weights}, path)
    return path.parent if layout == "folder" else path


@pytest.mark.parametrize("layout", ["pth", "safetensors", "diffusers", "folder", "prefixed"])
@pytest.mark.parametrize("network", MAKERS)
def test_load(tmp_path: Path, layout: str, network: str) -> None:
    vae = MAKERS[network]()
    info = identify_vae(written(tmp_path, layout, vae), vae.space)
    assert info.config == vae.config and info.space == vae.space
    loaded = load_vae(info, dtype=torch.float32, device="cpu")
    assert type(loaded) is type(vae) and not loaded.training
    raw = random_latents(vae)
    assert torch.equal(decode(loaded, raw), decode(vae, raw))


@pytest.mark.parametrize("network", ["wan2.1", "wan2.2"])
@pytest.mark.parametrize(("dtype", "psnr"), [(torch.bfloat16, 25), (torch.float16, 45)])
def test_load_narrow(tmp_path: Path, network: str, dtype: torch.dtype, psnr: float) -> None:
    vae = MAKERS[network]()
    loaded = load_vae(identify_vae(written(tmp_path, "safetensors", vae)), dtype=dtype, device="cpu")
    raw, pixels = random_latents(vae), torch.rand(1, 3, 5, 32, 48) * 2 - 1
    made, exact = decode(loaded, raw), decode(vae, raw)
    assert made.dtype == torch.float32 and 10 * torch.log10(4 / (made - exact).square().mean()) > psnr
    assert relative_error(encode(loaded, pixels), encode(vae, pixels)) < 0.2


def header_of(tensors: dict[str, tuple[int, ...]]) -> Header:
    path = Path("some/file.safetensors")
    return Header(path, {name: TensorInfo(torch.float32, shape, path) for name, shape in tensors.items()}, {})


def manifest_header(name: str) -> Header:
    tensors = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))["tensors"]
    return header_of({key: tuple(tensor["shape"]) for key, tensor in tensors.items()})


PUBLISHED = [("comfyui_wan_2.1_vae", wan), ("comfyui_wan2.2_vae", wan22), ("hunyuan15_vae", hunyuan15)]
NETWORKS = {wan: wan.WanVAE, wan22: wan22.Wan22VAE, hunyuan15: hunyuan15.HunyuanVAE}


@pytest.mark.parametrize(("name", "family"), [*PUBLISHED, ("comfyui_hunyuan15_vae_fp16", hunyuan15)])
def test_the_published_checkpoint_fits(name: str, family: ModuleType) -> None:
    header = manifest_header(name)
    config = family.config_from_header(header)
    assert config == type(config)(), "the defaults are the published widths"
    with torch.device("meta"):
        vae = NETWORKS[family](config)
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == {
        name: info.shape for name, info in header.tensors.items()
    }


def test_diffusers_copy_of_hunyuans_fits() -> None:
    header = manifest_header("diffusers_hunyuan15_vae")
    config = hunyuan15.config_from_header(header)
    with torch.device("meta"):
        vae = hunyuan15.HunyuanVAE(config)
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == {
        hunyuan15.from_diffusers(name): info.shape for name, info in header.tensors.items()
    }


def test_lightvae_is_a_narrow_one() -> None:
    assert wan.config_from_header(manifest_header("lightx2v_lightvaew2_1")) == wan.WanVAEConfig(base_channels=24)


def wrong_headers() -> Iterator[tuple[Header, str]]:
    yield manifest_header("taew2_1"), "a tiny autoencoder"
    yield manifest_header("taew2_2"), "a tiny autoencoder"
    yield manifest_header("hunyuan15_vae"), "the VAE of HunyuanVideo-1.5"
    yield manifest_header("comfyui_hunyuan15_vae_fp16"), "the VAE of HunyuanVideo-1.5"
    yield manifest_header("wan2.1_t2v_1.3B"), "a Wan transformer"
    yield manifest_header("diffusers_wan2.1_t2v_1.3B"), "a Wan transformer in diffusers' layout"
    yield manifest_header("comfyui_umt5_xxl_fp16"), "a umT5 text encoder"
    yield manifest_header("lora_kijai_lightx2v_i2v_14B_rank64_bf16"), "a LoRA"
    yield header_of({"decoder.mid.block_1.conv1.conv.weight": (1024, 1024, 3, 3, 3)}), "autoencoder of another model"
    yield header_of({"something.weight": (1,)}), r"unknown \(1 tensors, first 'something.weight'\)"


@pytest.mark.parametrize("family", [wan, wan22])
@pytest.mark.parametrize(("header", "words"), list(wrong_headers()))
def test_another_file_is_named(header: Header, words: str, family: ModuleType) -> None:
    needed = "Wan2.1" if family is wan else "Wan2.2"
    with pytest.raises(CheckpointError, match=f"some/file.safetensors: this is .*{words}.*choose a {needed} VAE"):
        family.config_from_header(header)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(("network", "family", "channels"), [("wan2.1", wan22, 16), ("wan2.2", wan, 48)])
def test_each_family_names_the_other(network: str, family: ModuleType, channels: int, layout: str) -> None:
    vae = MAKERS[network]()
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    if layout == "diffusers":
        shapes = {name: shapes[original] for name, original in diffusers_names(vae).items()}
    with pytest.raises(CheckpointError, match=f"this is .* VAE.*, with {channels} latent channels, not a"):
        family.config_from_header(header_of(shapes))


def test_the_door_refuses(tmp_path: Path) -> None:
    save_file({"decoder.mid.block_1.conv1.conv.weight": torch.zeros(2)}, tmp_path / "sd.safetensors")
    words = "sd.safetensors: this is the autoencoder of another model, not a Wan VAE; choose a Wan2.1 VAE.*a Wan2.2 VAE"
    with pytest.raises(CheckpointError, match=words):
        identify_vae(tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        identify_vae(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("network", "space", "words"), [("wan2.1", WAN22, "16.*has 48"), ("wan2.2", WAN21, "48.*has 16")]
)
def test_a_vae_of_other_latents_is_refused(tmp_path: Path, network: str, space: LatentFormat, words: str) -> None:
    path = written(tmp_path, "safetensors", MAKERS[network]())
    with pytest.raises(
        CheckpointError, match=f"vae.safetensors: this is a W.*with {words}: choose the VAE that belongs"
    ):
        identify_vae(path, space)


@pytest.mark.parametrize(
    ("network", "name", "words"),
    [
        ("wan2.1", "decoder.upsamples.3.time_conv.bias", "1 of 194 tensors are missing"),
        ("wan2.2", "decoder.upsamples.1.upsamples.3.time_conv.bias", "1 of 196 tensors are missing"),
    ],
)
def test_an_incomplete_file_is_refused(tmp_path: Path, network: str, name: str, words: str) -> None:
    weights = {key: tensor.clone() for key, tensor in MAKERS[network]().state_dict().items() if key != name}
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=f"{words}.*{name}"):
        load_vae(identify_vae(tmp_path / "vae.safetensors"), dtype=torch.float32, device="cpu")
