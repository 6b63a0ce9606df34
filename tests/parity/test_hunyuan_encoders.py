"""HunyuanVideo-1.5's encoders against transformers' own models and ComfyUI's: small random weights, CPU, float32."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_encoders15 as tiny
from lightx2v.text import byt5, chat, hunyuan15, qwen
from lightx2v.vision import siglip
from lightx2v.vision.clip import preprocess
from tiny_clip import picture

SAME = 1e-6
PROMPTS = [
    "",
    "a red cat walks over the wet sand",
    'a shop sign "OPEN", another “24 h”, again "OPEN"',
    "红猫\n (cat:1.3)",
]


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def saved(state: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> hunyuan15.HunyuanText:
    folder = tmp_path_factory.mktemp("text")
    tiny.write_tokenizer(folder / "tokenizer")
    language = saved(tiny.qwen_state(), folder / "qwen_2.5_vl_7b.safetensors")
    return hunyuan15.load(language, saved(tiny.byt5_state(), folder / "byt5.safetensors"))


@pytest.fixture(scope="module")
def whole_qwen() -> nn.Module:
    """transformers' whole model, vision tower, last blocks and head and all."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    size = tiny.QWEN
    text = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000,
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 256}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    state = {name: tensor for name, tensor in tiny.qwen_state().items() if not name.startswith("visual.")}
    named = {f"model.language_{name}" if name != "lm_head.weight" else name: t for name, t in state.items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected and all(".visual." in name for name in missing)
    return model.requires_grad_(False)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_language_equals_the_whole_model_padded_masked_and_cropped(encoder, whole_qwen, prompt: str) -> None:
    ids, start = encoder.language.tokenizer.asked(prompt)
    padded = torch.tensor([ids + [0] * 7])
    mask = torch.tensor([[1] * len(ids) + [0] * 7])
    states = whole_qwen(input_ids=padded, attention_mask=mask, output_hidden_states=True).hidden_states
    ours = encoder.language.encode(prompt)
    assert relative(ours, states[-3][:, start : len(ids)]) < SAME
    assert relative(ours, states[-2][:, start : len(ids)]) > 0.1, "the next block should show"


def test_template_and_crop_are_diffusers(encoder) -> None:
    """The system message with its runs of blanks, a blank for no prompt, and what is kept: the prompt and the rest."""
    from diffusers import HunyuanVideo15Pipeline
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input

    defaults = HunyuanVideo15Pipeline._get_mllm_prompt_embeds.__kwdefaults__ or {}
    values = HunyuanVideo15Pipeline._get_mllm_prompt_embeds.__defaults__ or ()
    system = next(value for value in (*defaults.values(), *values) if isinstance(value, str))
    assert system == chat.SYSTEM
    assert format_text_input([""], system)[0][1]["content"] == " "
    tokenizer = encoder.language.tokenizer
    for prompt in PROMPTS:
        ids, start = tokenizer.asked(prompt)
        assert tokenizer.words.decode(ids[start:]) == f"{prompt or ' '}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_glyphs_equal_diffusers_padded_and_masked(encoder, prompt: str) -> None:
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    told = extract_glyph_texts(prompt)
    assert byt5.glyph_prompt(prompt) == told
    ours = encoder.glyphs.encode(prompt)
    if told is None:
        assert ours is None
        return
    size = tiny.BYT5
    config = T5Config(
        vocab_size=size.vocab_size,
        d_model=size.hidden_size,
        d_kv=size.head_dim,
        d_ff=size.ffn_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        feed_forward_proj="gated-gelu",
    )
    theirs = T5EncoderModel(config).eval().requires_grad_(False)
    theirs.load_state_dict(tiny.byt5_state(), strict=False)
    theirs.tie_weights()
    tokens = ByT5Tokenizer()(told, padding="max_length", max_length=256, truncation=True, return_tensors="pt")
    assert byt5.byte_ids(told) == tokens.input_ids[0, : int(tokens.attention_mask.sum())].tolist()
    expected = theirs(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.float())[0]
    assert relative(ours, expected[:, : ours.shape[1]]) < SAME


def comfy_clip(language: Path, glyphs: Path, size: qwen.Sizes) -> tuple[nn.Module, object]:
    """What DualCLIPLoader makes of the two files with type hunyuan_video_15, but for the vision tower."""
    importlib.import_module("comfy.text_encoders.t5")
    llama = importlib.import_module("comfy.text_encoders.llama")
    image = importlib.import_module("comfy.text_encoders.hunyuan_image")
    video = importlib.import_module("comfy.text_encoders.hunyuan_video")
    utils = importlib.import_module("comfy.utils")
    tower, llama.qwen_vl.Qwen2VLVisionTransformer = llama.qwen_vl.Qwen2VLVisionTransformer, lambda **_: nn.Identity()
    text = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
    }
    small = {"vocab_size": 384, "d_ff": 48, "d_kv": 192, "num_heads": 2, "num_layers": 3}
    options = {"qwen25_7b_model_config": text, "_model_config": small}
    try:
        model = image.te()(dtype=torch.float32, model_options=options)
    finally:
        llama.qwen_vl.Qwen2VLVisionTransformer = tower
    for path in (language, glyphs):
        model.load_sd({name: t for name, t in utils.load_torch_file(str(path)).items() if "visual" not in name})
    return model.requires_grad_(False), video.HunyuanVideo15Tokenizer()


@pytest.fixture(scope="module")
def beside_comfy(comfy, tmp_path_factory) -> tuple[hunyuan15.HunyuanText, nn.Module, object]:
    """Ours and ComfyUI's over the same files, with Qwen's own vocabulary, which ComfyUI carries."""
    folder = tmp_path_factory.mktemp("comfy")
    size = replace(tiny.QWEN, vocab_size=152064, hidden_size=64)
    language = saved(tiny.qwen_state(size), folder / "qwen_2.5_vl_7b.safetensors")
    glyphs = saved(tiny.byt5_state(), folder / "byt5_small_glyphxl_fp16.safetensors")
    vocabulary = Path(importlib.import_module("comfy.text_encoders").__path__[0]) / "qwen25_tokenizer"
    return hunyuan15.load(language, glyphs, tokenizer=vocabulary), *comfy_clip(language, glyphs, size)


@pytest.mark.parametrize("prompt", ["", "a red cat", "a shop sign “OPEN” in the rain", "红猫 (cat:1.3)\nand more"])
def test_equals_comfyui_from_text_to_features(beside_comfy, prompt: str) -> None:
    """On the conversation that we ask with: ComfyUI's own has line ends where the model was trained with blanks."""
    ours, theirs, tokenizer = beside_comfy
    words = ours.language.tokenizer
    ids, start = words.asked(prompt)
    assert start == 108, "what diffusers leaves out"
    conversation = words.words.decode(ids)
    (tokens,) = tokenizer.tokenize_with_weights(conversation)["qwen25_7b"]
    assert [token for token, *_ in tokens] == ids
    quoted = tokenizer.tokenize_with_weights(prompt)
    quoted["qwen25_7b"] = [tokens]
    expected, _, extra = theirs.encode_token_weights(quoted)
    found = ours.condition(prompt)
    assert relative(found.context, expected) < SAME
    assert ("conditioning_byt5small" in extra) == (found.glyphs is not None) == ("“" in prompt)
    if found.glyphs is not None:
        assert relative(found.glyphs, extra["conditioning_byt5small"]) < SAME


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> siglip.ImageEncoder:
    return siglip.load(saved(tiny.siglip_state(), tmp_path_factory.mktemp("siglip") / "sigclip.safetensors"))


def siglip_config() -> dict[str, object]:
    size = tiny.SIGLIP
    return {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.hidden_size // siglip.HEAD_DIM,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
    }


def test_pictures_equal_transformers(eyes) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    theirs = SiglipVisionModel(SiglipVisionConfig(**siglip_config(), vision_use_head=False)).eval()
    names = theirs.state_dict()
    state = {name: t for name, t in tiny.siglip_state().items() if "head" not in name}
    shorten = not any(name.startswith("vision_model.") for name in names)
    theirs.load_state_dict({k.removeprefix("vision_model.") if shorten else k: t for k, t in state.items()})
    image = picture(90, 160)
    pixels = preprocess(image, 56, resize="comfyui", mean=siglip.MEAN, std=siglip.STD)
    expected = theirs.requires_grad_(False)(pixel_values=pixels, output_hidden_states=True)
    ours = eyes.features(image)
    assert relative(eyes.encode(image), expected.last_hidden_state) < SAME
    assert relative(ours.penultimate, expected.hidden_states[-2]) < SAME
    assert relative(ours.last, ours.penultimate) > 0.1
    array = (image[0] * 255).round().byte().numpy()
    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    shown = processor(array, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert (shown - pixels).abs().max() < 3 / 127.5, "a filtered resize of the whole picture, to 8 bits"


def test_pictures_equal_comfyui(comfy, eyes, tmp_path) -> None:
    """Its layer norms have an epsilon of 1e-5 where SigLIP's is 1e-6."""
    clip_vision = importlib.import_module("comfy.clip_vision")
    told = {**siglip_config(), "num_channels": 3, "model_type": "siglip_vision_model"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**told, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    peer = clip_vision.ClipVisionModel(path)
    peer.model.float()
    missing, _ = peer.load_sd(tiny.siglip_state())
    assert not missing
    expected = peer.encode_image(picture(90, 160), crop=False)
    ours = eyes.features(picture(90, 160))
    assert relative(ours.last, expected["last_hidden_state"]) < 1e-4
    assert relative(ours.penultimate, expected["penultimate_hidden_states"]) < 1e-4
    assert relative(ours.embedding, expected["image_embeds"]) < 1e-4


def test_sizes_are_read_from_the_published_names(eyes, encoder) -> None:
    assert asdict(eyes.size) == asdict(tiny.SIGLIP)
    assert len(encoder.language.model.layers) == tiny.QWEN.num_layers - 2
