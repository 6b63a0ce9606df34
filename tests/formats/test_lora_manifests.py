"""LoRAs as they are published, as sparse files of their real size: every tensor is applied or named with its reason."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sparse import manifest, write

from lightx2v.checkpoint import CheckpointError, read_header
from lightx2v.lora import is_lora, match, read_lora
from lightx2v.lora.dialects import LoraFile
from lightx2v.lora.matching import Coverage, Shape

I2V, T2V, A14B_I2V, HUNYUAN = "wan2.1_i2v_14B", "wan2.1_t2v_14B", "wan2.2_i2v_A14B", "hunyuan15_dit"
# Manifest of the LoRA, of the model that it was made for; the parameters of the model that it changes.
PUBLISHED = [
    ("lora_kijai_lightx2v_i2v_14B_rank64_bf16", I2V, 1261),
    ("lora_lightx2v_wan2.1_i2v_14B_rank64", I2V, 1261),
    ("lora_lightx2v_wan2.2_i2v_A14B_rank64", A14B_I2V, 1053),
    ("lora_comfy_wan2.2_i2v_A14B_lightx2v_4steps", A14B_I2V, 400),
    ("lora_diffusion_model_AB_wan2.1_i2v_14B", I2V, 480),
    ("lora_diffusion_model_AB_wan2.1_t2v_14B", T2V, 400),
    ("lora_diffusion_model_AB_wan2.2_t2v_A14B", "wan2.2_t2v_A14B", 400),
    ("lora_peft_diffusers_wan2.1_i2v_14B", I2V, 480),
    ("lora_peft_diffusers_wan2.1_t2v_14B", T2V, 400),
    ("lora_musubi_wan2.1_t2v_14B", T2V, 400),
    ("lora_musubi_wan2.2_t2v_A14B", "wan2.2_t2v_A14B", 400),
    ("lora_comfy_hunyuan15_lightx2v_4step_rank32_bf16", HUNYUAN, 1576),
    ("lora_musubi_hunyuan15", HUNYUAN, 756),
]
NAMES = [name for name, _, _ in PUBLISHED]


def shapes(name: str) -> dict[str, Shape]:
    return {key: tuple(tensor["shape"]) for key, tensor in manifest(name)["tensors"].items()}


def lora(name: str, folder: Path) -> LoraFile:
    return read_lora(write(manifest(name)["tensors"], folder / "a.safetensors"))


def assert_whole(coverage: Coverage, name: str) -> None:
    """Every tensor of the file is either applied or skipped for a reason."""
    keys = set(manifest(name)["tensors"])
    assert coverage.applied | set(coverage.skipped) == keys and not coverage.applied & set(coverage.skipped)
    assert all(coverage.skipped.values())


def test_every_manifest_of_a_lora_is_here() -> None:
    folder = Path(__file__).parent / "manifests"
    assert {path.name.removesuffix(".json.gz") for path in folder.glob("lora_*")} == set(NAMES)


@pytest.mark.parametrize(("name", "base", "parameters"), PUBLISHED)
def test_every_tensor_is_applied_to_its_model(name: str, base: str, parameters: int, tmp_path: Path) -> None:
    model = shapes(base)
    coverage = match(lora(name, tmp_path), model)
    assert_whole(coverage, name)
    assert not coverage.skipped
    changed = [patch.parameter for patch in coverage.patches]
    assert len(set(changed)) == len(changed) == parameters
    # What a patch adds is of the parameter's size: rows of the fused layers included.
    tensors = manifest(name)["tensors"]
    for patch in coverage.patches:
        first = tensors[patch.tensors[0]]["shape"]
        rows = patch.rows[1] - patch.rows[0] if patch.rows else first[0]
        columns = math.prod(tensors[patch.tensors[-1]]["shape"][1:])
        assert rows * columns == math.prod(model[patch.parameter]), patch


@pytest.mark.parametrize("name", NAMES)
def test_is_listed_as_a_lora(name: str, tmp_path: Path) -> None:
    assert is_lora(write(manifest(name)["tensors"], tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", [T2V, "comfyui_wan_2.1_vae", "comfyui_umt5_xxl_fp16", HUNYUAN, "taew2_1"])
def test_whole_models_are_not(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no LoRA tensors; it is"):
        is_lora(write(manifest(name)["tensors"], tmp_path / "a.safetensors"))


@pytest.mark.parametrize(("name", "skipped"), [("lora_kijai_lightx2v_i2v_14B_rank64_bf16", 290)])
def test_an_image_to_video_lora_on_a_text_to_video_model(name: str, skipped: int, tmp_path: Path) -> None:
    """What reads the picture has no place there and is named; the rest is applied."""
    coverage = match(lora(name, tmp_path), shapes(T2V))
    assert_whole(coverage, name)
    assert len(coverage.skipped) == skipped
    assert all("_img." in key or ".img_emb." in key for key in coverage.skipped)
    assert set(coverage.skipped.values()) == {"names a layer that this model does not have"}


@pytest.mark.parametrize("name", [name for name in NAMES if "hunyuan" not in name])
def test_another_width_is_refused_with_both_shapes(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is for 5120 x \d+, the model's '\S+' is 1536 x \d+") as caught:
        match(lora(name, tmp_path), shapes("wan2.1_t2v_1.3B"))
    assert "a.safetensors: made for another model" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "base", "theirs", "ours"),
    [
        ("lora_musubi_hunyuan15", T2V, "12288 x 2048", "5120 x 4096"),
        ("lora_comfy_hunyuan15_lightx2v_4step_rank32_bf16", T2V, "2048 x 1472", "5120 x 4096"),
        ("lora_musubi_wan2.1_t2v_14B", HUNYUAN, "5120 x 5120", "2048 x 256"),
    ],
)
def test_another_family_is_refused_with_both_shapes(
    name: str, base: str, theirs: str, ours: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"none of its .* is for {theirs}, the model has .*, {ours}"):
        match(lora(name, tmp_path), shapes(base))


def test_sparse_files_are_of_the_real_size(tmp_path: Path) -> None:
    """So that what is read here is read as it would be from the real file."""
    name = "lora_comfy_wan2.2_i2v_A14B_lightx2v_4steps"
    path = write(manifest(name)["tensors"], tmp_path / "a.safetensors")
    assert path.stat().st_size == pytest.approx(manifest(name)["safetensors_size"], rel=1e-3)
    assert len(read_header(path).tensors) == 1200
