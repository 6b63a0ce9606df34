"""Our image encoder against transformers', ComfyUI's own and Wan's formulas: small random weights, CPU, float32."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_clip
from lightx2v.vision.clip import MEAN, STD, ImageEncoder, load, preprocess
from tiny_clip import CONFIG, SIZES, picture

SAME = 1e-6


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Values that float16 holds, so that a peer which keeps its weights in float16 has the same ones."""
    return {n: t.half().float() if t.is_floating_point() else t for n, t in tiny_clip.state_dict().items()}


@pytest.fixture(scope="module")
def encoder(state, tmp_path_factory) -> ImageEncoder:
    path = tmp_path_factory.mktemp("clip") / "clip_vision_h.safetensors"
    save_file(state, path)
    return load(path)


@pytest.fixture(scope="module")
def theirs(state) -> nn.Module:
    """transformers' CLIPVisionModelWithProjection with the same weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    peer = CLIPVisionModelWithProjection(CLIPVisionConfig(**CONFIG)).eval().requires_grad_(False)
    peer.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")})
    return peer


def test_equals_transformers(encoder, theirs) -> None:
    image = picture(batch=2)
    ours = encoder.features(image)
    expected = theirs(pixel_values=preprocess(image, 56), output_hidden_states=True)
    assert relative(encoder.encode(image), expected.hidden_states[-2]) < SAME
    assert relative(ours.penultimate, expected.hidden_states[-2]) < SAME
    assert relative(ours.last, expected.last_hidden_state) < SAME
    assert relative(ours.embedding, expected.image_embeds) < SAME
    assert relative(ours.last, ours.penultimate) > 0.1, "the last block should show"


def test_attention_in_these_weights_is_far_from_flat(theirs) -> None:
    """Otherwise a dropped scale or swapped heads would hide below the bound."""
    theirs.set_attn_implementation("eager")
    for weights in theirs(pixel_values=preprocess(picture(), 56), output_attentions=True).attentions:
        assert weights.amax(-1).mean() > 4 / weights.shape[-1]
    theirs.set_attn_implementation("sdpa")


@pytest.mark.parametrize("crop", ["none", "center"])
@pytest.mark.parametrize("size", [(56, 56), (90, 160), (161, 97), (40, 33)])
def test_equals_comfyui_from_picture_to_output(comfy, encoder, state, tmp_path, crop: str, size) -> None:
    """CLIPVisionEncode, preprocessing and all, where it is asked for."""
    clip_vision = importlib.import_module("comfy.clip_vision")
    config = Path(tmp_path / "config.json")
    config.write_text(json.dumps({**CONFIG, "num_channels": 3, "model_type": "clip_vision_model"}))
    peer = clip_vision.ClipVisionModel(config)
    missing, unexpected = peer.load_sd(dict(state))
    assert not missing and unexpected == ["vision_model.embeddings.position_ids"]
    image = picture(*size, batch=2)
    expected = peer.encode_image(image, crop=crop == "center")
    ours = encoder.features(image, crop=crop, resize="comfyui")
    assert relative(ours.penultimate, expected.penultimate_hidden_states) < SAME
    assert relative(ours.last, expected.last_hidden_state) < SAME
    assert relative(ours.embedding, expected.image_embeds) < SAME


def test_equals_diffusers_pipeline(encoder, theirs) -> None:
    """Its encode_image on a picture of the network's own size, where no way to resize plays a part."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    class Pipeline:
        image_processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        image_encoder = theirs

    bytes_ = (picture()[0] * 255).round().to(torch.uint8)
    expected = WanImageToVideoPipeline.encode_image(Pipeline, numpy.asarray(bytes_), torch.device("cpu"))
    assert relative(encoder.encode(bytes_[None] / 255), expected) < SAME


def wan_visual(weights: dict[str, Tensor], videos: Tensor, num_heads: int) -> Tensor:
    """Frames (B, 3, H, W) in [-1, 1] -> (B, L, D), written out over Wan's own names, so that no table of ours says
    which weight does what. Source of names and order: Wan-Video/Wan2.1, wan/modules/clip.py; formulas: Dosovitskiy et
    al. 2021 (ViT), Radford et al. 2021 (CLIP)."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"]
            + weights[name + ".bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    mean, std = (torch.tensor(values, dtype=videos.dtype).view(3, 1, 1) for values in (MEAN, STD))
    side = 56
    # In float32, as Wan does: where the samples of a large picture fall depends on it.
    pixels = torch.nn.functional.interpolate(videos.float(), (side, side), mode="bicubic", align_corners=False)
    pixels = (pixels.double() * 0.5 + 0.5 - mean) / std
    kernel = weights["visual.patch_embedding.weight"]
    patches = rearrange(pixels, "b c (y p) (x q) -> b (y x) (c p q)", p=14, q=14) @ kernel.flatten(1).T
    x = torch.cat([weights["visual.cls_embedding"].expand(len(videos), -1, -1), patches], 1)
    x = norm(x + weights["visual.pos_embedding"], "visual.pre_norm")
    blocks = sum(name.endswith("norm1.weight") and name.startswith("visual") for name in weights)
    for block in (f"visual.transformer.{index}" for index in range(blocks - 1)):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.to_qkv")
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=num_heads)
        attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(rearrange(attended, "b h l d -> b l (h d)"), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.mlp.2")
    return x


@pytest.mark.parametrize("size", [(56, 56), (90, 160)])
def test_wans_names_and_preprocessing_mean_what_wan_means_by_them(tmp_path, size) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = tiny_clip.original(tiny_clip.state_dict())
    weights = {
        name: (1.0 if "norm" in name and "weight" in name else 0.0)
        + torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5 * 1.5)
        for name, tensor in weights.items()
    }
    torch.save(weights, tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    ours = load(tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    image = picture(*size, batch=2)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = wan_visual(exact, image.double().movedim(-1, 1) * 2 - 1, SIZES.num_heads)
    assert relative(ours.encode(image).double(), expected) < SAME


def test_every_layout_gives_the_same_features(encoder, theirs, state, tmp_path) -> None:
    wan = tiny_clip.original(state)
    torch.save(wan, tmp_path / "original.pth")
    save_file(wan, tmp_path / "original.safetensors")
    bare = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    save_file(bare, tmp_path / "no_projection.safetensors")
    save_file({name.removeprefix("vision_model."): t for name, t in bare.items()}, tmp_path / "no_prefix.safetensors")
    theirs.vision_model.save_pretrained(tmp_path / "image_encoder")
    image = picture(90, 160)
    files = ("original.pth", "original.safetensors", "no_projection.safetensors", "no_prefix.safetensors")
    for name in (*files, "image_encoder"):
        other = load(tmp_path / name)
        assert torch.equal(other.encode(image), encoder.encode(image)), name
        assert (other.size.projection_size is None) == (not name.startswith("original"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_files_are_computed_in_float32(encoder, theirs, state, tmp_path, dtype) -> None:
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    ours = load(tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in ours.model.parameters()} == {dtype}
    save_file({n: t.float() if t.is_floating_point() else t for n, t in half.items()}, tmp_path / "wide.safetensors")
    assert torch.equal(ours.encode(picture()), load(tmp_path / "wide.safetensors").encode(picture()))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_files_are_expanded(encoder, state, tmp_path, dtype, caplog) -> None:
    packed = tiny_clip.quantised(tiny_clip.original(state), dtype)
    save_file(packed, tmp_path / "clip-8bit.safetensors")
    with caplog.at_level("INFO"):
        ours = load(tmp_path / "clip-8bit.safetensors")
    assert "clip-8bit.safetensors: 8-bit weights, held as torch.float16" in caplog.text
    matrix = "visual.transformer.1.attn.to_qkv.weight"
    expected = (packed[matrix].double() * packed[matrix + "_scale"].double())[160:320]
    found = ours.model.vision_model.encoder.layers[1].block.self_attn.k_proj.weight
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=2**-11, atol=2**-25)
    exact = load(tmp_path / "clip-8bit.safetensors", dtype=torch.float32)
    assert relative(ours.encode(picture()), exact.encode(picture())) < 1e-3
    assert 1e-3 < relative(ours.encode(picture()), encoder.encode(picture())) < 0.1, "8 bits should show, a little"
