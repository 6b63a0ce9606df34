"""The whole way from prompt and picture to latents against diffusers' pipelines: small random weights, float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_encoders15 as encoders
from closeness import relative_error
from lightx2v import LightX2VPipeline
from lightx2v.diffuse import Hooks, noise_like
from lightx2v.media import read_image
from lightx2v.stages import encode
from lightx2v.vae.hunyuan15 import from_diffusers
from tiny_hunyuan import make_tiny, to_diffusers
from tiny_hunyuan_folder import FITTING, GLYPHS, PLACES, write, write_folder
from tiny_vae import tiny_vae15

# diffusers fixes these proportions.
CONFIG = replace(FITTING, ffn_size=1024, refiner_ffn_size=1024, glyph_size=2048)
EYES = replace(encoders.SIGLIP, grid=8)
# Pictures of this size are not resized by anyone, so the two libraries' ways to do that do not show.
SIZE = {"height": 112, "width": 112, "num_frames": 5}
STEPS, SEED = 4, 11
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("hunyuan"), "diffusers", CONFIG)
    write(encoders.siglip_state(EYES), folder / PLACES["diffusers"]["siglip"])
    pixels = numpy.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    return folder


def ours(folder: Path, prompt: str, negative: str, image: Path | None) -> Tensor:
    """Latents in model space."""
    pipe = LightX2VPipeline(folder, "hunyuan_video_1.5", "i2v" if image else "t2v", device="cpu")
    pipe.create_generator(infer_steps=STEPS, **SIZE)
    request = replace(pipe._request, prompt=prompt, negative_prompt=negative)
    request = replace(request, sampling=replace(request.sampling, seed=SEED))
    spec = pipe._info.spec
    encoded = encode(pipe._parts, spec, request, None if image is None else read_image(image), None)
    return spec.latents.normalize(pipe._sample(request, encoded, Hooks))


def language(folder: Path) -> nn.Module:
    from transformers import Qwen2_5_VLTextModel
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    size = encoders.QWEN
    config = Qwen2_5_VLTextConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        max_position_embeddings=128000,
    )
    model = Qwen2_5_VLTextModel(config)
    model.load_state_dict(load_file(folder / PLACES["diffusers"]["language"]))
    return model.eval().requires_grad_(False)


def glyphs() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=GLYPHS.vocab_size,
        d_model=GLYPHS.hidden_size,
        d_kv=GLYPHS.head_dim,
        d_ff=GLYPHS.ffn_size,
        num_layers=GLYPHS.num_layers,
        num_heads=GLYPHS.num_heads,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config)
    model.load_state_dict(encoders.byt5_state(GLYPHS), strict=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def eyes() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=EYES.hidden_size,
        intermediate_size=EYES.ffn_size,
        num_hidden_layers=EYES.num_layers,
        num_attention_heads=EYES.hidden_size // 72,
        image_size=EYES.image_size,
        patch_size=EYES.patch_size,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    model = SiglipVisionModel(config)
    flat = not any(name.startswith("vision_model.") for name in model.state_dict())
    state = {name: tensor for name, tensor in encoders.siglip_state(EYES).items() if ".head." not in name}
    model.load_state_dict({name.removeprefix("vision_model.") if flat else name: t for name, t in state.items()})
    return model.eval().requires_grad_(False)


def transformer_and_vae() -> tuple[nn.Module, nn.Module]:
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.out_channels,
        num_attention_heads=CONFIG.num_heads,
        num_layers=CONFIG.num_layers,
        text_embed_dim=CONFIG.text_dim,
        text_embed_2_dim=CONFIG.glyph_dim,
        image_embed_dim=CONFIG.image_dim,
        target_size=112,
    )
    transformer.load_state_dict(to_diffusers(make_tiny(CONFIG).state_dict()))
    vae = AutoencoderKLHunyuanVideo15(block_out_channels=(16, 32, 64, 128, 128))
    weights = tiny_vae15().state_dict()
    vae.load_state_dict({name: weights[from_diffusers(name)].clone() for name in vae.state_dict()})
    return transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def diffusers(folder: Path, prompt: str, negative: str, image: Path | None, start: int) -> Tensor:
    """start: where the prompt begins in this vocabulary's conversation; in Qwen's own it is diffusers' 108."""
    from diffusers import (
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15ImageToVideoPipeline,
        HunyuanVideo15Pipeline,
    )
    from transformers import ByT5Tokenizer, Qwen2Tokenizer, SiglipImageProcessor

    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder / "tokenizer"))
    tokenizer.chat_template, tokenizer.pad_token = CHAT, "<|im_end|>"
    transformer, vae = transformer_and_vae()
    parts: dict[str, Any] = {
        "text_encoder": language(folder),
        "tokenizer": tokenizer,
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": glyphs(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    asked: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "num_frames": SIZE["num_frames"]}
    if image is None:
        pipe: Any = HunyuanVideo15Pipeline(**parts)
        asked |= SIZE
    else:
        seen = SiglipImageProcessor(size={"height": 112, "width": 112})
        pipe = HunyuanVideo15ImageToVideoPipeline(**parts, image_encoder=eyes(), feature_extractor=seen)
        asked["image"] = Image.open(image)
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length = start, 100
    pipe.vision_num_semantic_tokens = EYES.grid**2
    pipe.set_progress_bar_config(disable=True)
    noise = noise_like(torch.zeros(1, 32, 2, 7, 7), SEED)
    return pipe(**asked, num_inference_steps=STEPS, latents=noise, output_type="latent", return_dict=False)[0]


QUOTING = ('a red cat says "MEOW" and “MEOW”, then "PURR"', 'wet sand, a "sign"')


@pytest.mark.parametrize(
    ("prompt", "negative", "given"), [("a red cat", "", False), (*QUOTING, False), (*QUOTING, True)]
)
def test_latents_are_diffusers(folder: Path, prompt: str, negative: str, given: bool) -> None:
    pipe = LightX2VPipeline(folder, "hunyuan_video_1.5", device="cpu")
    _, start = pipe._parts.text_encoder().language.tokenizer.asked(prompt)
    image = folder / "first.png" if given else None
    found, expected = ours(folder, prompt, negative, image), diffusers(folder, prompt, negative, image, start)
    assert expected.std() > 0.1
    assert relative_error(found, expected) < 1e-5
