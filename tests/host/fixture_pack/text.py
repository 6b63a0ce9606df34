"""A umT5 of any size as ComfyUI's own CLIP, which CLIPLoader only makes at the published size."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

# Wan's own key names -> those that ComfyUI's T5 has. In a gated feed-forward wi_0 is the gate.
_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}


class FixtureUmt5Clip(io.ComfyNode):
    """Load a umT5 checkpoint in Wan's key names, its tokenizer inside it (`spiece_model`) or in a file beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureUmt5Clip",
            category="tests",
            inputs=[
                io.String.Input("file", tooltip="Name of a file in text_encoders"),
                io.String.Input(
                    "tokenizer", default="", tooltip="Path of a sentencepiece model; empty: inside the file"
                ),
            ],
            outputs=[io.Clip.Output("clip")],
        )

    @classmethod
    def execute(cls, file: str, tokenizer: str) -> io.NodeOutput:
        tensors = comfy.utils.load_torch_file(
            folder_paths.get_full_path_or_raise("text_encoders", file), safe_load=True
        )
        pieces = Path(tokenizer).read_bytes() if tokenizer else bytes(tensors["spiece_model"].tolist())
        weights = {_rename(name): tensor.float() for name, tensor in tensors.items() if name != "spiece_model"}
        clip = comfy.sd.CLIP(
            SimpleNamespace(
                params={}, clip=comfy.text_encoders.wan.te(), tokenizer=comfy.text_encoders.wan.WanT5Tokenizer
            ),
            tokenizer_data={"spiece_model": pieces},
            model_options={"umt5xxl_model_config": _config(weights), "dtype": torch.float32},
        )
        missing, unexpected = clip.load_sd(weights)
        wrong = [
            name for name in (*missing, *unexpected) if "logit_scale" not in name and "text_projection" not in name
        ]
        if wrong:
            raise ValueError(f"{file}: keys that do not fit ComfyUI's umT5: {wrong}")
        return io.NodeOutput(clip)


def _rename(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _BLOCK:
        raise ValueError(f"{name} is not a key of Wan's umT5")
    return f"encoder.block.{match[1]}.{_BLOCK[match[2]]}.weight"


def _config(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    first = "encoder.block.0.layer."
    heads = weights[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape[1]
    return {
        "num_layers": sum(name.endswith("SelfAttention.q.weight") for name in weights),
        "num_heads": heads,
        "d_kv": weights[f"{first}0.SelfAttention.q.weight"].shape[0] // heads,
        "d_ff": weights[f"{first}1.DenseReluDense.wi_0.weight"].shape[0],
        "vocab_size": weights["shared.weight"].shape[0],
    }
