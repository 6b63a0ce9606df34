"""Published encoders of HunyuanVideo-1.5, as sparse files of their real size: every key placed, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sparse import manifest, write
from torch import nn

from lightx2v.checkpoint import CheckpointError, places
from lightx2v.text import byt5, qwen
from lightx2v.text.layout import Sizes
from lightx2v.text.resting import stay_packed
from lightx2v.text.umt5 import empty_network
from lightx2v.vision import siglip

QWEN_FILES = (
    "qwen2.5_vl_7b_hf",
    "qwen2.5_vl_7b_language_part",
    "comfyui_qwen_2.5_vl_7b",
    "comfyui_qwen_2.5_vl_7b_fp8_scaled",
    "lightx2v_qwen25vl_llm_fp8_e4m3",
)
BYT5_FILES = ("comfyui_byt5_small_glyphxl_fp16", "glyph_sdxl_v2_byt5_model_pt")
SIGLIP_FILES = ("comfyui_sigclip_vision_patch14_384", "siglip_so400m_redux_image_encoder")
Reader = Callable[[Path], object]


def laid_out(name: str, folder: Path) -> Path:
    return write(manifest(name)["tensors"], folder / "picked.safetensors")


@pytest.mark.parametrize("name", QWEN_FILES)
def test_qwen(name: str, tmp_path: Path) -> None:
    header, size = qwen.open_encoder(laid_out(name, tmp_path))
    assert size == qwen.Sizes(152064, 3584, 28, 4, 18944, 28)
    model = qwen.empty(size)
    assert len(model.layers) == 26 and not list(model.norm.parameters())
    packed, rename = stay_packed(model, header, qwen.used_by(model))
    found = places(model, packed, rename)
    assert set(found.values()) == set(model.state_dict())
    eight_bits = sum(info.dtype == torch.float8_e4m3fn for key, info in packed.tensors.items() if key in found)
    assert eight_bits == (26 * 7 if "fp8" in name else 0)


@pytest.mark.parametrize("name", BYT5_FILES)
def test_byt5(name: str, tmp_path: Path) -> None:
    header, size = byt5.open_encoder(laid_out(name, tmp_path))
    assert size == Sizes(1510, 1472, 6, 64, 3584, 12, 32)
    model = empty_network(size, "T5")
    assert set(places(model, header).values()) == set(model.state_dict())


@pytest.mark.parametrize("name", SIGLIP_FILES)
def test_siglip(name: str, tmp_path: Path) -> None:
    header, size = siglip.open_encoder(laid_out(name, tmp_path))
    assert size == siglip.Sizes(1152, 4304, 27, 14, 27) and size.image_size == 384
    model: nn.Module = siglip.empty(size)
    found = places(getattr(model, "vision_model", model), header, siglip.used)
    unused = header.tensors.keys() - found.keys()
    assert unused and all(key.startswith("head.") for key in unused)


@pytest.mark.parametrize(
    ("read", "name", "words"),
    [
        (qwen.open_encoder, "umt5_xxl_transformers_bf16", "a umT5 text encoder, not a Qwen2.5-VL text encoder"),
        (qwen.open_encoder, "comfyui_byt5_small_glyphxl_fp16", "a byT5 text encoder (Glyph), not a Qwen2.5-VL"),
        (byt5.open_encoder, "comfyui_qwen_2.5_vl_7b", "a Qwen2.5-VL text encoder, not byT5"),
        (byt5.open_encoder, "umt5_xxl_transformers_bf16", "a umT5 text encoder, not byT5"),
        (siglip.open_encoder, "comfyui_clip_vision_h", "Wan's image encoder (CLIP ViT-H), not SigLIP"),
        (siglip.open_encoder, "hunyuan15_vae", "the VAE of HunyuanVideo-1.5, not SigLIP"),
    ],
)
def test_refused_in_words(read: Reader, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(laid_out(name, tmp_path))
    assert words in str(caught.value) and "picked.safetensors" in str(caught.value)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    tensors = dict(manifest("qwen2.5_vl_7b_language_part")["tensors"])
    for key in [key for key in tensors if ".layers.7." in key]:
        del tensors[key]
    with pytest.raises(CheckpointError, match=r"expected blocks 0, 1, 2 .* found 27 with numbers up to 27"):
        qwen.open_encoder(write(tensors, tmp_path / "picked.safetensors"))
