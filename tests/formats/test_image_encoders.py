"""Published image encoders, as sparse files of their real size: which are read, every key consumed, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sparse import manifest, write

from lightx2v.checkpoint import CheckpointError, read_header
from lightx2v.vision.clip import empty, library_name, load
from lightx2v.vision.layout import SCALE, Sizes, convert, shapes, sizes, weights

PUBLISHED = ["comfyui_clip_vision_h", "wan_clip_xlm_roberta_vit_h14", "lightx2v_clip_vit_h14_fp8"]
NOT_FOR_THE_PICTURE = ("textual.", "log_scale", "vision_model.embeddings.position_ids")


def laid_out(name: str, folder: Path, **changes: dict | None) -> Path:
    tensors = {**manifest(name)["tensors"], **changes}
    return write({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / "picked.safetensors")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recognised_and_every_key_has_a_place(name: str, tmp_path: Path) -> None:
    header = read_header(laid_out(name, tmp_path))
    assert sizes(header) == Sizes(1280, 5120, 32, 14, 16, 1024)
    assert (sizes(header).num_heads, sizes(header).image_size) == (16, 224)
    expected = {key: tuple(tensor.shape) for key, tensor in empty(sizes(header)).state_dict().items()}
    assert {library_name(name): shape for name, shape in shapes(header).items()} == expected
    used = {key for key in weights(header) if list(convert(key, torch.empty(header.shape(key), device="meta")))}
    used |= {scale for scale in weights(header).values() if scale}
    assert {key for key in header.tensors if not key.startswith(NOT_FOR_THE_PICTURE)} == used


def test_scales_belong_to_the_quantised_weights_only(tmp_path: Path) -> None:
    header = read_header(laid_out("lightx2v_clip_vit_h14_fp8", tmp_path))
    quantised = {key for key, scale in weights(header).items() if scale}
    assert len(quantised) == 4 * 32
    assert all(header.tensors[key].dtype == torch.float8_e4m3fn for key in quantised)


REFUSED = [
    ("comfyui_sigclip_vision_patch14_384", "SigLIP, the image encoder of HunyuanVideo-1.5, not Wan2.1's image encoder"),
    ("comfyui_wan_2.1_vae", "a Wan2.1 VAE, with 16 latent channels, not"),
    ("comfyui_umt5_xxl_fp16", "a umT5 text encoder, not"),
    ("wan2.1_i2v_14B", "a Wan transformer, not"),
    ("lora_kijai_lightx2v_i2v_14B_rank64_bf16", "a LoRA of Wan, not"),
]


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_refused_in_words(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(laid_out(name, tmp_path))
    assert words in str(caught.value) and "picked.safetensors" in str(caught.value)
    assert "use clip_vision_h.safetensors" in str(caught.value)


LAYER = "vision_model.encoder.layers.3.mlp.fc1.weight"
FP8 = "visual.transformer.3.attn.to_qkv.weight"
DAMAGED = [
    ("comfyui_clip_vision_h", {LAYER: None}, "'encoder.layers.3.mlp.fc1.weight' is missing"),
    (
        "comfyui_clip_vision_h",
        {LAYER: {"dtype": "F16", "shape": [5120, 640]}},
        "is [5120, 640], the image encoder needs",
    ),
    ("comfyui_clip_vision_h", {"vision_model.novelty": {"dtype": "F16", "shape": [4]}}, "first 'novelty'"),
    (
        "comfyui_clip_vision_h",
        {LAYER: {"dtype": "U8", "shape": [5120, 1280]}},
        "is torch.uint8, which cannot be a weight",
    ),
    ("comfyui_clip_vision_h", {LAYER: {"dtype": "F8_E4M3", "shape": [5120, 1280]}}, f"needs '{LAYER}{SCALE}'"),
    (
        "lightx2v_clip_vit_h14_fp8",
        {FP8 + SCALE: None},
        f"needs '{FP8}{SCALE}', [3840, 1] in floating point; found none",
    ),
    ("lightx2v_clip_vit_h14_fp8", {FP8 + SCALE: {"dtype": "F32", "shape": [30, 128]}}, "found torch.float32 [30, 128]"),
    ("lightx2v_clip_vit_h14_fp8", {FP8 + SCALE: {"dtype": "U8", "shape": [3840, 1]}}, "found torch.uint8 [3840, 1]"),
    ("wan_clip_xlm_roberta_vit_h14", {FP8: {"dtype": "F32", "shape": [2, 1280]}}, "impossible shape [2, 1280]"),
]


@pytest.mark.parametrize(("name", "changes", "words"), DAMAGED, ids=[words for _, _, words in DAMAGED])
def test_incomplete_and_strange_files_are_refused(name: str, changes: dict, words: str, tmp_path: Path) -> None:
    """Before any weight is read: these files hold none."""
    with pytest.raises(CheckpointError) as caught:
        load(laid_out(name, tmp_path, **changes))
    assert words in str(caught.value) and "picked.safetensors" in str(caught.value)


def test_other_vision_transformers_are_refused(tmp_path: Path) -> None:
    """ViT-L/14 of OpenAI, which has the same names: 1024 channels, 16 heads of 64, another activation."""
    tensors = {}
    for key, tensor in manifest("comfyui_clip_vision_h")["tensors"].items():
        shape = [{1280: 1024, 5120: 4096}.get(n, n) for n in tensor["shape"]]
        tensors[key] = {"dtype": tensor["dtype"], "shape": shape}
    with pytest.raises(CheckpointError, match=r"of another kind \(1024 channels, 257 tokens, patches of \[14, 14\]"):
        load(write(tensors, tmp_path / "vit_l.safetensors"))


def test_a_gap_between_layers_is_seen(tmp_path: Path) -> None:
    gone = {key: None for key in manifest("comfyui_clip_vision_h")["tensors"] if ".layers.7." in key}
    with pytest.raises(CheckpointError, match="without a gap, found 31 with numbers up to 31"):
        load(laid_out("comfyui_clip_vision_h", tmp_path, **gone))
