"""Published checkpoints, laid out as sparse files of their real size: what each is said to be, and how fast."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import PUBLISHED
from sparse import lay_out, lay_out_split, manifest, names, write

from lightx2v.checkpoint import CheckpointError
from lightx2v.identify import FileInfo, identify, recognise
from lightx2v.layout import Layout
from lightx2v_kernels import select

KERNELS = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)
WAN = [name for name, words in PUBLISHED.items() if words.startswith("transformer wan ")]
HUNYUAN = [name for name, words in PUBLISHED.items() if words.startswith("transformer hunyuan1.5 ")]
HUNYUAN.remove("hunyuan15_dit_sr")
FOREIGN = [name for name in PUBLISHED if name not in WAN + HUNYUAN]
BLOCK_SPLIT = [name for name in WAN if "block_split" in manifest(name)]
MARKS = ("scaled_fp8", ".comfy_quant", ".scale_input", ".input_scale")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder whose name gives no hint, as the test's own might."""
    return tmp_path / "models"


def words(found: FileInfo) -> str:
    stated = (found.task, found.layout.format, found.layout.scheme, found.expert_hint, found.distilled)
    return " ".join([found.kind.replace(" ", "_"), found.family, *(value or "-" for value in stated)])


def files_tensors(layout: Layout) -> list[str]:
    """Every name of the file that a weight is made of or that is listed as not needed."""
    made = []
    for name, info in layout.header.tensors.items():
        parts = list(info.packed.parts.values()) if info.packed else [replace(info, stored=info.stored or name)]
        # Of a tensor that is cut into several weights the first piece stands for it, and for its scale.
        if not any(part.rows and part.rows[0] for part in parts) or "0" in (info.packed.parts if info.packed else ()):
            made += list(dict.fromkeys(part.stored for part in parts))
    return made + list(layout.unused)


def test_the_table_names_every_manifest() -> None:
    assert sorted(PUBLISHED) == names()


@pytest.mark.parametrize("name", PUBLISHED)
def test_recognised(name: str, models: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lay_out(name, models)
    start = time.perf_counter()
    found = recognise(path)
    with caplog.at_level(logging.INFO):
        logging.info("%s recognised in %.0f ms", name, 1000 * (time.perf_counter() - start))
    assert words(found) == PUBLISHED[name]
    assert sorted(files_tensors(found.layout)) == sorted(manifest(name)["tensors"])
    assert all(name.endswith(MARKS) and reason for name, reason in found.layout.unused.items())


@pytest.mark.parametrize("name", WAN + HUNYUAN)
def test_every_weight_of_the_model_is_in_the_file(name: str, models: Path) -> None:
    info = identify(lay_out(name, models))
    with torch.device("meta"):
        network = info.spec.build(info.config, KERNELS)
    found = {key: tensor.shape for key, tensor in info.header.tensors.items()}
    assert found == {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", HUNYUAN)
def test_hunyuan_is_told_by_what_it_reads(name: str, models: Path) -> None:
    assert identify(lay_out(name, models)).spec.name == "hunyuan1.5" + ("_step_distilled" if "step" in name else "")


def test_the_super_resolution_model_is_named(models: Path) -> None:
    path = lay_out("hunyuan15_dit_sr", models)
    with pytest.raises(CheckpointError, match=r"the super-resolution model of HunyuanVideo-1\.5; videos are not"):
        identify(path)


@pytest.mark.parametrize("name", BLOCK_SPLIT)
def test_one_file_a_block(name: str, models: Path) -> None:
    content = manifest(name)
    whole = identify(lay_out(name, models / "whole"))
    split = identify(lay_out_split(content["tensors"], content["block_split"], models / "split"))
    assert (split.format, split.spec, split.config, split.scheme) == (
        "block-split",
        whole.spec,
        whole.config,
        whole.scheme,
    )
    assert split.header.tensors.keys() == whole.header.tensors.keys()


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_model_to_run_is_named(name: str, models: Path) -> None:
    path = lay_out(name, models)
    with pytest.raises(CheckpointError, match=r"this file is an? |this file is the |this file is ") as caught:
        identify(path)
    assert str(path) in str(caught.value) and "Supported here: HunyuanVideo-1.5, " in str(caught.value)
    assert "of a model that is not known" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wan2.1_t2v_1.3B", "Wan2.1 T2V 1.3B (825 tensors, fp32, 5,676.0 MB)"),
        ("lightx2v_wan2.1_t2v_1.3B_fp8", "fp8 weights (e4m3, a scale a row), 1,448.7 MB)"),
        ("lightx2v_wan2.1_t2v_1.3B_fp8_comfyui", "fp8 weights (e4m3, a scale a tensor)"),
        ("lightx2v_wan2.1_t2v_14B_int8", "int8 weights (a scale a row)"),
        ("gguf_wan2.2_i2v_A14B_Q4_K_M", "gguf weights (Q4_K)"),
        ("lightx2v_wan2.2_t2v_A14B_fp8", "high-noise expert by its name, distilled to few steps by its name)"),
        ("comfyui_wan_2.1_vae", "channels; load it with LightX2VLoadVAE (models/vae) (194 tensors, fp16, 253.8 MB)"),
    ],
)
def test_described_in_words(name: str, said: str, models: Path) -> None:
    assert said in recognise(lay_out(name, models)).describe()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixed_as_in_whole_checkpoints(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + key: tensor for key, tensor in manifest("wan2.1_t2v_1.3B")["tensors"].items()}
    info = identify(write(tensors, tmp_path / "m.safetensors"))
    assert (info.spec.name, info.format) == ("wan2.1_t2v_1.3b", "comfyui")


def test_everything_in_one_file(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{k}": t for k, t in manifest("wan2.1_t2v_1.3B")["tensors"].items()}
    vae = {f"vae.{key}": tensor for key, tensor in manifest("wan2.1_vae")["tensors"].items()}
    info = identify(write(tensors | vae, tmp_path / "m.safetensors"))
    assert info.spec.name == "wan2.1_t2v_1.3b"
    assert set(info.unused) == set(vae) and set(info.unused.values()) == {
        "belongs to the VAE, which the file carries too"
    }


def test_sizes_of_the_published_models(models: Path) -> None:
    config = identify(lay_out("wan2.1_t2v_14B", models)).config
    assert (config.hidden_size, config.ffn_size, config.num_heads, config.num_layers) == (5120, 13824, 40, 40)


NAMES = [
    ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high", None),
    ("Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low", None),
    ("wan2.2_i2v_A14b_low_noise_lightx2v_4step.safetensors", "low", "steps"),
    ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "high", None),
    ("high_noise_model/diffusion_pytorch_model.safetensors", "high", None),
    ("high_noise_model/low_noise.safetensors", "low", None),
    ("high_low_noise.safetensors", "low", None),
    ("high_noise_low_noise.safetensors", None, None),
    ("wan2.1_low_vram.safetensors", None, None),
    ("highway_noise.safetensors", None, None),
    ("transformer_2/diffusion_pytorch_model.safetensors", "low", None),
    ("wan2.1_t2v_14B_StepDistill-CfgDistill.safetensors", None, "steps"),
    ("hunyuan_cfg_distilled.safetensors", None, "cfg"),
    ("Wan2.2-Lightning_T2V.safetensors", None, "steps"),
    ("footsteps.safetensors", None, None),
]


@pytest.mark.parametrize(("name", "expert", "distilled"), NAMES)
def test_hints_of_names(name: str, expert: str | None, distilled: str | None, models: Path) -> None:
    path = write(manifest("wan2.1_t2v_1.3B")["tensors"], (models / name).with_suffix(".safetensors"))
    found = identify(path)
    assert (found.expert_hint, found.distilled) == (expert, distilled)


def test_first_of_two_transformers_of_diffusers_is_the_high_noise_one(models: Path) -> None:
    tensors = manifest("diffusers_wan2.1_t2v_1.3B")["tensors"]
    for folder in ("transformer", "transformer_2"):
        write(tensors, models / folder / "diffusion_pytorch_model.safetensors")
    assert identify(models / "transformer").expert_hint == "high"
    assert identify(models / "transformer_2").expert_hint == "low"
    with pytest.raises(CheckpointError, match=r"several models \(transformer, transformer_2\)"):
        identify(models)
