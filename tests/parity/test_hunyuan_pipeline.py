"""The whole way from a prompt to latents against diffusers' HunyuanVideo15Pipeline: small random weights, float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_encoders15 as encoders
from closeness import relative_error
from lightx2v import LightX2VPipeline
from lightx2v.diffuse import Hooks, noise_like
from lightx2v.stages import encode
from tiny_hunyuan import make_tiny, to_diffusers
from tiny_hunyuan_folder import FITTING, GLYPHS, PLACES, write_folder

# diffusers fixes these proportions.
CONFIG = replace(FITTING, ffn_size=1024, refiner_ffn_size=1024, glyph_size=2048)
SIZE = {"height": 48, "width": 64, "num_frames": 9}
STEPS, SEED = 4, 11
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hunyuan"), "diffusers", CONFIG)


def ours(folder: Path, prompt: str, negative: str) -> Tensor:
    """Latents in model space."""
    pipe = LightX2VPipeline(folder, "hunyuan_video_1.5", device="cpu")
    pipe.create_generator(infer_steps=STEPS, **SIZE)
    request = replace(pipe._request, prompt=prompt, negative_prompt=negative)
    request = replace(request, sampling=replace(request.sampling, seed=SEED))
    spec = pipe._info.spec
    cond, uncond, begin = encode(pipe._parts, spec, request, None, None)
    return spec.latents.normalize(pipe._sample(request, cond, uncond, begin, Hooks()))


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


def diffusers(folder: Path, prompt: str, negative: str, start: int) -> Tensor:
    """start: where the prompt begins in this vocabulary's conversation; in Qwen's own it is diffusers' 108."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2Tokenizer

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.out_channels,
        num_attention_heads=CONFIG.num_heads,
        num_layers=CONFIG.num_layers,
        text_embed_dim=CONFIG.text_dim,
        text_embed_2_dim=CONFIG.glyph_dim,
        image_embed_dim=CONFIG.image_dim,
    )
    transformer.load_state_dict(to_diffusers(make_tiny(CONFIG).state_dict()))
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder / "tokenizer"))
    tokenizer.chat_template, tokenizer.pad_token = CHAT, "<|im_end|>"
    pipe = HunyuanVideo15Pipeline(
        text_encoder=language(folder),
        tokenizer=tokenizer,
        transformer=transformer.eval().requires_grad_(False),
        vae=AutoencoderKLHunyuanVideo15(block_out_channels=(16, 32, 64, 128, 128)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=glyphs(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length = start, 100
    pipe.set_progress_bar_config(disable=True)
    noise = noise_like(torch.zeros(1, 32, 3, 3, 4), SEED)
    return pipe(
        prompt, negative, **SIZE, num_inference_steps=STEPS, latents=noise, output_type="latent", return_dict=False
    )[0]


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("a red cat", ""), ('a red cat says "MEOW" and “MEOW”, then "PURR"', 'wet sand, a "sign"')],
)
def test_latents_are_diffusers(folder: Path, prompt: str, negative: str) -> None:
    pipe = LightX2VPipeline(folder, "hunyuan_video_1.5", device="cpu")
    _, start = pipe._parts.text_encoder().language.tokenizer.asked(prompt)
    found, expected = ours(folder, prompt, negative), diffusers(folder, prompt, negative, start)
    assert expected.std() > 0.1
    assert relative_error(found, expected) < 1e-5
