"""Published checkpoints, laid out as sparse files of their real size: what is recognised, and what is refused how."""

from pathlib import Path

import pytest
import torch
from sparse import lay_out, manifest, write

from lightx2v.checkpoint import CheckpointError
from lightx2v.identify import identify
from lightx2v_kernels import select

KERNELS = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)

SUPPORTED = [
    ("wan2.1_t2v_1.3B", "wan2.1_t2v_1.3b", torch.float32),
    ("comfyui_wan2.1_t2v_1.3B_fp16", "wan2.1_t2v_1.3b", torch.float16),
    ("wan2.1_t2v_14B", "wan2.1_t2v_14b", torch.float32),
    ("wan2.2_t2v_A14B", "wan2.1_t2v_14b", torch.float32),  # one layout, see models/wan/spec.py
    ("lightx2v_wan2.1_t2v_14B_distill_bf16", "wan2.1_t2v_14b", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "variant", "dtype"), SUPPORTED)
def test_recognised_and_every_key_has_a_place(name: str, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    info = identify(lay_out(name, tmp_path))
    assert info.spec.name == variant
    assert info.dtype == dtype
    with torch.device("meta"):
        network = info.spec.build(info.config, KERNELS)
    expected = {key: tuple(tensor["shape"]) for key, tensor in manifest(name)["tensors"].items()}
    assert {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == expected


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixed_as_in_whole_checkpoints(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + key: tensor for key, tensor in manifest("wan2.1_t2v_1.3B")["tensors"].items()}
    assert identify(write(tensors, tmp_path / "m.safetensors")).spec.name == "wan2.1_t2v_1.3b"


def test_sizes_of_the_published_models(tmp_path: Path) -> None:
    config = identify(lay_out("wan2.1_t2v_14B", tmp_path)).config
    assert (config.hidden_size, config.ffn_size, config.num_heads, config.num_layers) == (5120, 13824, 40, 40)


REFUSED = [
    ("wan2.1_i2v_14B", "image-to-video model, which is not supported yet"),
    ("wan2.2_i2v_A14B", "image-to-video model, which is not supported yet"),
    ("wan2.1_flf2v_14B", "image-to-video model, which is not supported yet"),
    ("wan2.2_ti2v_5B", "Wan2.2 TI2V-5B, which is not supported yet"),
    ("lightx2v_wan2.1_t2v_1.3B_fp8", "quantised weights"),
    ("lightx2v_wan2.1_t2v_14B_int8", "quantised weights"),
    ("comfyui_wan2.2_i2v_A14B_fp8_scaled", "quantised weights"),
    ("diffusers_wan2.1_t2v_1.3B", "a diffusers-layout transformer"),
    ("hunyuan15_dit", "HunyuanVideo-1.5, which is not supported yet"),
    ("comfyui_hunyuan15_fp16", "HunyuanVideo"),
    ("comfyui_wan_2.1_vae", "a Wan VAE; load it with LightX2VLoadVAE"),
    ("comfyui_umt5_xxl_fp16", "a T5 text encoder; load it with LightX2VLoadTextEncoder"),
    ("umt5_xxl_transformers_bf16", "a T5 text encoder"),
    ("taew2_1", "a tiny autoencoder"),
    ("lora_kijai_lightx2v_i2v_14B_rank64_bf16", "a LoRA, not a whole model"),
]


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_refused_in_words(name: str, words: str, tmp_path: Path) -> None:
    path = write(manifest(name)["tensors"], tmp_path / "picked.safetensors")
    with pytest.raises(CheckpointError) as caught:
        identify(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_nothing_known(tmp_path: Path) -> None:
    path = write({"a": {"dtype": "F32", "shape": [2]}}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"not known \(1 tensors\). Supported here: Wan2.1 T2V 1.3B"):
        identify(path)


def test_half_a_model(tmp_path: Path) -> None:
    tensors = manifest("wan2.1_t2v_1.3B")["tensors"]
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("blocks.0.")}
    with pytest.raises(CheckpointError, match="not known"):
        identify(write(kept, tmp_path / "m.safetensors"))
