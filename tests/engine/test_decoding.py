"""Which VAE a pipeline decodes with, and whole frames or tiles by choice, by plan and after memory ran out."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from host.tiny_models import write_tiny_models
from lightx2v import LightX2VPipeline
from lightx2v.__main__ import main
from lightx2v.checkpoint import CheckpointError
from lightx2v.decoding import Decoding, decode_video, fitting
from lightx2v.memory import vae_decode_bytes
from lightx2v.offload import DoesNotFitError
from lightx2v.vae.loading import VAEInfo
from lightx2v.vae.stream import decode
from lightx2v.vae.tiling import Tiling, largest_tile
from lightx2v.vae.wan import WanVAE, WanVAEConfig
from tiny_vae import tiny_tae, tiny_vae, tiny_vae22

SMALL = {"height": 32, "width": 48, "num_frames": 5, "infer_steps": 1}
NARROW = (12, 10, 8, 6)


def save(path: Path, network: nn.Module) -> Path:
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan folder with a LightVAE and a tiny autoencoder, of random weights."""
    models, wan = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan")
    names = write_tiny_models(models)
    (models / "diffusion_models" / names.diffusion_model).rename(wan / "diffusion_pytorch_model.safetensors")
    (models / "text_encoders" / names.text_encoder).rename(wan / "models_t5_umt5-xxl-enc.safetensors")
    save(wan / "Wan2.1_VAE.safetensors", tiny_vae())
    save(wan / "lightvaew2_1.safetensors", tiny_vae(4, seed=1))
    save(wan / "lighttaew2_1.safetensors", tiny_tae("lighttaew2_1", NARROW))
    return wan


@pytest.fixture
def pipe(folder: Path) -> LightX2VPipeline:
    pipe = LightX2VPipeline(folder)
    pipe.create_generator(**SMALL)
    return pipe


def video(pipe: LightX2VPipeline) -> Tensor:
    made = pipe.generate(seed=1, prompt="a red circle", return_result_tensor=True, progress=False)["video"]
    assert made is not None and made.shape == (5, 32, 48, 3)
    return made


def test_each_choice_decodes_otherwise_and_default_is_the_folders(pipe: LightX2VPipeline, folder: Path) -> None:
    full = video(pipe)
    pipe.enable_lightvae(use_lightvae=True)
    light = video(pipe)
    pipe.enable_lightvae(use_tae=True)
    tiny = video(pipe)
    pipe.enable_lightvae(use_tae=True, tae_path=folder / "lighttaew2_1.safetensors", use_lightvae=False, vae_path=None)
    assert torch.equal(video(pipe), tiny)
    pipe.enable_lightvae(vae_path=folder / "lightvaew2_1.safetensors")
    assert torch.equal(video(pipe), light)
    pipe.enable_lightvae()
    assert torch.equal(video(pipe), full)
    assert min((light - full).abs().mean(), (tiny - full).abs().mean(), (tiny - light).abs().mean()) > 0.01


def test_wrong_files_are_refused_before_weights_are_read(
    pipe: LightX2VPipeline, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tae22 = save(tmp_path / "taew2_2.safetensors", tiny_tae("taew2_2", NARROW))
    vae22 = save(tmp_path / "Wan2.2_VAE.safetensors", tiny_vae22())
    with pytest.raises(CheckpointError, match=r"taew2_2.safetensors: .* 48 latent channels; the model has 16"):
        pipe.enable_lightvae(use_tae=True, tae_path=tae22)
    with pytest.raises(CheckpointError, match=r"Wan2.2_VAE.safetensors: .* 48 latent channels; the model has 16"):
        pipe.enable_lightvae(vae_path=vae22)
    with pytest.raises(CheckpointError, match=r"nowhere.pth: no such file"):
        pipe.enable_lightvae(use_tae=True, tae_path="nowhere.pth")
    with pytest.raises(ValueError, match=r"tae_path: .* is a Wan2.1 VAE, not a tiny autoencoder; give it as vae_path"):
        pipe.enable_lightvae(use_tae=True, tae_path=folder / "Wan2.1_VAE.safetensors")
    with pytest.raises(ValueError, match=r"vae_path: .* cannot replace the VAE; give it as tae_path"):
        pipe.enable_lightvae(vae_path=folder / "lighttaew2_1.safetensors")
    with caplog.at_level(logging.WARNING):
        pipe.enable_lightvae(tae_path=tae22)
    assert "tae_path is not used: use_tae is False" in caplog.text


def test_a_folder_without_them_says_what_it_looked_for(folder: Path, tmp_path: Path) -> None:
    for part in folder.iterdir():
        if not part.name.startswith("light"):
            (tmp_path / part.name).symlink_to(part)
    pipe = LightX2VPipeline(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tiny autoencoder here; looked for taew2_1.safetensors, taew2_1.pth"):
        pipe.enable_lightvae(use_tae=True)
    with pytest.raises(CheckpointError, match=r"no LightVAE here; looked for lightvaew2_1.safetensors"):
        pipe.enable_lightvae(use_lightvae=True)


def test_the_command_line_takes_both(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = [f"--{name}={value}" for name, value in SMALL.items()]
    command = ["generate", "--model_path", str(folder), "--prompt", "a red circle", "--quiet", *size]
    command += ["--save_result_path", str(tmp_path / "a.mp4")]
    assert main([*command, "--tae_path", str(folder / "lighttaew2_1.safetensors")]) == 0
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert main([*command, "--tae_path", str(folder / "Wan2.1_VAE.safetensors")]) == 1
    assert "not a tiny autoencoder" in capsys.readouterr().err
    assert main([*command, "--vae_path", "nowhere.pth"]) == 1
    assert "nowhere.pth: no such file" in capsys.readouterr().err


INFO = VAEInfo(Path("vae"), tiny_vae().config)
TILES = Tiling(64, 16)


@pytest.fixture
def raw() -> Tensor:
    return torch.randn(1, 16, 2, 12, 20, generator=torch.Generator().manual_seed(0))


def test_tiles_by_choice_and_by_plan(raw: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    vae, needed = tiny_vae(), vae_decode_bytes(INFO, raw.shape, torch.float32, frames=False)
    whole = decode(vae, raw)

    def made(mode: str, free: int | None) -> Tensor:
        return decode_video(INFO, vae, raw, Decoding(mode, TILES), free=free, progress=False)

    tiled = made("tiled", None)
    assert tiled.shape == whole.shape and tiled.abs().max() <= 1 and not torch.equal(tiled, whole)
    assert all(torch.equal(made(mode, free), whole) for mode, free in (("auto", None), ("auto", needed), ("full", 1)))
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert torch.equal(made("auto", needed - 1), tiled)
    assert "Decoding in tiles of 64 pixels: whole frames take" in caplog.text


def test_tiles_once_when_memory_runs_out(raw: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """A VAE for which anything wider than a tile is too much."""
    vae = tiny_vae()
    tiled = decode_video(INFO, vae, raw, Decoding("tiled", TILES), progress=False)
    reconstruct, widths = WanVAE.reconstruct, []

    def tight(part: Tensor, state: object = None) -> Tensor:
        widths.append(part.shape[4])
        if part.shape[4] > 8:
            raise torch.OutOfMemoryError("the test's")
        return reconstruct(vae, part, state)  # type: ignore[arg-type]

    vae.reconstruct = tight  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        made = decode_video(INFO, vae, raw, Decoding("auto", TILES), progress=False)
    assert torch.equal(made, tiled) and widths.count(20) == 1
    assert "Decoding in tiles of 64 pixels: memory ran out for whole frames" in caplog.text
    refused = r"ran out while decoding 160x96 in whole frames \(the test's\): decode in tiles of 256 pixels, take"
    with pytest.raises(DoesNotFitError, match=refused):
        decode_video(INFO, vae, raw, Decoding("full", TILES), progress=False)


def test_memory_that_runs_out_for_tiles_too(raw: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    vae, made_room = tiny_vae(), []
    wide = torch.cat([raw, raw], 4)
    needed = vae_decode_bytes(INFO, (1, 16, 2, 12, 32), torch.float32, frames=False)
    reconstruct, widths = WanVAE.reconstruct, []

    def made(most: int) -> Tensor:
        def tight(part: Tensor, state: object = None) -> Tensor:
            widths.append(part.shape[4])
            if part.shape[4] > most:
                raise torch.OutOfMemoryError("the test's")
            return reconstruct(vae, part, state)  # type: ignore[arg-type]

        vae.reconstruct = tight  # type: ignore[method-assign]
        make_room = partial(made_room.append, 1)
        return decode_video(INFO, vae, wide, Decoding(), free=needed, progress=False, make_room=make_room)

    with caplog.at_level(logging.WARNING):
        assert made(24).shape == (1, 3, 5, 96, 320) and not made_room
        assert "in tiles of 192 pixels: whole frames take" in caplog.text and set(widths) == {24}
        assert made(16).shape == (1, 3, 5, 96, 320) and made_room == [1]
    assert "in tiles of 128 pixels: memory ran out for tiles of 192 pixels" in caplog.text
    with pytest.raises(DoesNotFitError, match=r"decoding 320x96 in tiles of 128 pixels .*: make the video smaller"):
        made(15)


@pytest.mark.parametrize(("room", "size"), [("whole", None), (896, 768), (640, 320), (320, 320), (256, 256), (0, 128)])
def test_tiles_of_720p_by_free_memory(room: str | int, size: int | None) -> None:
    """room: that of whole frames, or of tiles of so many pixels. Of all that fit, those with the least to decode."""
    info, shape = VAEInfo(Path("vae"), WanVAEConfig()), (1, 16, 21, 90, 160)

    def needed(tiling: Tiling) -> int:
        tile = largest_tile(shape[2:], info.space.stride, tiling)
        return vae_decode_bytes(info, (1, 16, *tile), torch.bfloat16, frames=False)

    whole = vae_decode_bytes(info, shape, torch.bfloat16, frames=False)
    free = whole if room == "whole" else needed(Tiling(int(room), 64)) if room else 1
    tiling = fitting(info, shape, torch.bfloat16, free)
    assert (tiling.size if tiling else None) == size
    assert tiling is None or not room or needed(tiling) <= free < whole


def test_the_pipeline_takes_a_mode(pipe: LightX2VPipeline) -> None:
    whole = video(pipe)
    pipe.enable_vae_tiling(tile_size=32, overlap=16)
    assert not torch.equal(video(pipe), whole)
    pipe.enable_vae_tiling("full")
    assert torch.equal(video(pipe), whole)
    with pytest.raises(ValueError, match="decode mode"):
        pipe.enable_vae_tiling("fast")
    with pytest.raises(ValueError, match="a tile's size is 16: expected at least 32"):
        pipe.enable_vae_tiling(tile_size=16)
