"""HunyuanVideo-1.5's text encoders of any size as ComfyUI's own CLIP, without the vision tower that nobody asks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.hunyuan_image
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.llama
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

HEAD_DIM = 128


class FixtureHunyuanClip(io.ComfyNode):
    """What DualCLIPLoader makes of a Qwen2.5-VL and a byT5 file, both with heads of 128, at their own size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureHunyuanClip",
            category="tests",
            inputs=[io.String.Input("language"), io.String.Input("glyphs")],
            outputs=[io.Clip.Output("clip")],
        )

    @classmethod
    def execute(cls, language: str, glyphs: str) -> io.NodeOutput:
        files = [_read(language), _read(glyphs)]
        target = SimpleNamespace(
            params={},
            clip=comfy.text_encoders.hunyuan_image.te(),
            tokenizer=comfy.text_encoders.hunyuan_video.HunyuanVideo15Tokenizer,
        )
        sizes = {"qwen25_7b_model_config": _qwen(files[0]), "_model_config": _byt5(files[1])}
        with _no_vision_tower():
            clip = comfy.sd.CLIP(target, model_options={**sizes, "dtype": torch.float32})
        for weights in files:
            _, unexpected = clip.load_sd(weights)
            if unexpected:
                raise ValueError(f"keys that do not fit ComfyUI's encoders: {unexpected}")
        return io.NodeOutput(clip)


def _read(file: str) -> dict[str, torch.Tensor]:
    path = folder_paths.get_full_path_or_raise("text_encoders", file)
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    return {name: t.float() for name, t in tensors.items() if not name.startswith(("visual.", "lm_head"))}


def _qwen(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    vocab_size, hidden_size = weights["model.embed_tokens.weight"].shape
    first = "model.layers.0."
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": weights[f"{first}mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": len({m[1] for name in weights if (m := re.search(r"\.layers\.(\d+)\.", name))}),
        "num_attention_heads": weights[f"{first}self_attn.q_proj.weight"].shape[0] // HEAD_DIM,
        "num_key_value_heads": weights[f"{first}self_attn.k_proj.weight"].shape[0] // HEAD_DIM,
    }


def _byt5(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    first = "encoder.block.0.layer."
    heads = weights[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape[1]
    return {
        "vocab_size": weights["shared.weight"].shape[0],
        "d_ff": weights[f"{first}1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": weights[f"{first}0.SelfAttention.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": sum(name.endswith("SelfAttention.q.weight") for name in weights),
    }


@contextmanager
def _no_vision_tower() -> Iterator[None]:
    """It is 670 M parameters whatever the sizes say."""
    module = comfy.text_encoders.llama.qwen_vl
    tower, module.Qwen2VLVisionTransformer = module.Qwen2VLVisionTransformer, lambda **_: torch.nn.Identity()
    try:
        yield
    finally:
        module.Qwen2VLVisionTransformer = tower
