"""Names in a graph come from whoever can reach the server: none leads out of the model and output folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.graphs import keep, node

pytestmark = pytest.mark.host

# Input of a loader -> how a graph names what is to be loaded.
LOADERS = {
    "LightX2VLoadModel": "original_ckpt",
    "LightX2VLoadTextEncoder": "text_encoder",
    "LightX2VLoadVAE": "vae_name",
    "LightX2VLoadImageEncoder": "image_encoder",
}


@pytest.fixture(scope="module")
def outside(host, tiny_models) -> Iterator[Path]:
    """Checkpoints that could be loaded, beside the folders of models: as files, and as a folder of one."""
    folder = host.base / "outside"
    folder.mkdir()
    models = host.base / "models"
    shutil.copy(models / "diffusion_models" / tiny_models.diffusion_model, folder / "LightX2VLoadModel.safetensors")
    shutil.copy(models / "text_encoders" / tiny_models.text_encoder, folder / "LightX2VLoadTextEncoder.safetensors")
    shutil.copy(models / "vae" / tiny_models.vae, folder / "LightX2VLoadVAE.safetensors")
    shutil.copy(models / "vae" / tiny_models.vae, folder / "LightX2VLoadImageEncoder.safetensors")
    yield folder
    shutil.rmtree(folder)


def names(outside: Path, loader: str) -> list[str]:
    file = f"{loader}.safetensors"
    return [
        f"../../outside/{file}",
        f"x/../../../outside/{file}",
        f"{outside}/{file}",
        "../../outside/",
        f"{outside}/",
        f"lightx2v-demo/../../../{file}",
        f"lightx2v-demo/{outside}/{file}",
        f"vae_approx/../../../outside/{file}",
        "a" * 5000,
        "a" * 5000 + "/",
        "a\0b.safetensors",
        "\x1b[2J.safetensors",
        "",
        "/",
    ]


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_look_in_the_model_folders_alone(host, outside, loader: str) -> None:
    for name in names(outside, loader):
        result = host.run(keep({"load": node(loader, **{LOADERS[loader]: name})}, "load"))
        assert result.status != "success", name
        said = result.message.lower()
        assert any(words in said for words in ("not found", "no such", "no file has", "is not", "both none")), (
            name,
            said,
        )
        assert len(said) < 4000 or name[:40] in said


def test_loras_look_there_too(host, tiny_models, outside) -> None:
    for name in names(outside, "LightX2VLoadModel"):
        graph = {"lora": node("LightX2VLoRA", lora_name=name, strength=1.0, expert="both")}
        assert host.run(keep(graph, "lora")).status != "success", name


def test_figures_are_named_and_not_read_from_a_path(host, tiny_models, outside) -> None:
    (outside / "figures.json").write_text("{}", encoding="utf-8")
    for name in (f"{outside}/figures.json", "../../outside/figures.json"):
        inputs = {"threshold": 0.1, "use_ret_steps": False, "max_skips": 6, "retention_ratio": 0.2}
        graph = {"cache": node("LightX2VCache", method="teacache", figures=name, **inputs)}
        result = host.run(keep(graph, "cache"))
        assert result.status != "success" and "figures" in result.message


@pytest.mark.parametrize("prefix", ["../../evil", "{outside}/evil", "a/../../../evil"])
def test_videos_are_saved_in_the_output_folder(host, outside, prefix: str) -> None:
    graph = {
        "picture": node("FixturePicture", seed=1, frames=2, width=32, height=32),
        "video": node("CreateVideo", images=["picture", 0], fps=16),
        "save": node(
            "SaveVideo", video=["video", 0], filename_prefix=prefix.format(outside=outside), format="mp4", codec="h264"
        ),
    }
    assert host.run(graph).status != "success"
    assert not list(host.base.parent.rglob("*evil*"))
    graph["save"]["inputs"]["filename_prefix"] = "good"
    host.run(graph).expect()
