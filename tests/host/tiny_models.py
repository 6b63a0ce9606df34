"""Checkpoints in the published layouts, small and random: what a graph can run on without trained weights."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

# ComfyUI reads the head count off hidden_size // 128, and fixes these two.
TEXT_WIDTH, TIME_WIDTH = 4096, 256

_SENTENCES = (
    "a red circle moves to the right over a blue background",
    "a green square and a yellow star turn slowly under the night sky",
    "0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz , . ! ? ( ) :",
)


@dataclass(frozen=True)
class TinyModels:
    """File names as the loaders list them."""

    diffusion_model: str
    text_encoder: str
    vae: str


def write_tiny_models(models: Path) -> TinyModels:
    """Write a Wan2.1 transformer, VAE and umT5 (tokenizer inside) below `models`; the same bytes every time."""
    names = TinyModels("tiny_wan2.1_t2v.safetensors", "tiny_umt5.safetensors", "tiny_wan2.1_vae.safetensors")
    generator = torch.Generator().manual_seed(0)
    _save(models / "diffusion_models" / names.diffusion_model, _random(transformer_shapes(), generator))
    _save(models / "vae" / names.vae, _random(vae_shapes(), generator))
    pieces = train_tokenizer()
    umt5 = _random(umt5_shapes(vocabulary=256), generator)
    umt5["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    _save(models / "text_encoders" / names.text_encoder, umt5)
    return names


@dataclass(frozen=True)
class Input:
    """What a transformer takes in beside text. clip: width of image tokens, 0: none; positions: of FLF2V."""

    channels: int = 16
    latents: int = 16
    clip: int = 0
    positions: int = 0


T2V, I2V, TI2V = Input(), Input(channels=36), Input(channels=48, latents=48)


def transformer_shapes(
    hidden_size: int = 256, ffn_size: int = 256, num_layers: int = 2, takes: Input = T2V
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Wan transformer (patch (1, 2, 2)) in Wan's own layout; as it is, of Wan2.1 T2V."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (hidden_size, takes.channels, 1, 2, 2)}
    shapes["patch_embedding.bias"] = (hidden_size,)

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out_features, in_features), (out_features,)

    linear("text_embedding.0", hidden_size, TEXT_WIDTH)
    linear("text_embedding.2", hidden_size, hidden_size)
    linear("time_embedding.0", hidden_size, TIME_WIDTH)
    linear("time_embedding.2", hidden_size, hidden_size)
    linear("time_projection.1", 6 * hidden_size, hidden_size)
    for block in (f"blocks.{index}" for index in range(num_layers)):
        shapes[f"{block}.modulation"] = (1, 6, hidden_size)
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                linear(f"{block}.{attention}.{projection}", hidden_size, hidden_size)
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (hidden_size,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (hidden_size,)
        linear(f"{block}.ffn.0", ffn_size, hidden_size)
        linear(f"{block}.ffn.2", hidden_size, ffn_size)
        if takes.clip:
            linear(f"{block}.cross_attn.k_img", hidden_size, hidden_size)
            linear(f"{block}.cross_attn.v_img", hidden_size, hidden_size)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (hidden_size,)
    shapes["head.modulation"] = (1, 2, hidden_size)
    linear("head.head", takes.latents * 4, hidden_size)
    if takes.clip:
        for norm, width in (("0", takes.clip), ("4", hidden_size)):
            shapes[f"img_emb.proj.{norm}.weight"] = shapes[f"img_emb.proj.{norm}.bias"] = (width,)
        linear("img_emb.proj.1", takes.clip, takes.clip)
        linear("img_emb.proj.3", hidden_size, takes.clip)
    if takes.positions:
        shapes["img_emb.emb_pos"] = (1, takes.positions, takes.clip)
    return shapes


def write_transformer(path: Path, takes: Input = T2V, *, seed: int = 0, num_layers: int = 2) -> Path:
    """A transformer of random weights that takes in that; the same bytes for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    _save(path, _random(transformer_shapes(takes=takes, num_layers=num_layers), generator))
    return path


def umt5_shapes(
    vocabulary: int, ffn_size: int = 32, num_heads: int = 2, num_layers: int = 2
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a umT5 encoder 4096 wide with heads of 64, in Wan's own layout."""
    inner = 64 * num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (vocabulary, TEXT_WIDTH),
        "norm.weight": (TEXT_WIDTH,),
    }
    for block in (f"blocks.{index}" for index in range(num_layers)):
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (TEXT_WIDTH,)
        for projection in "qkv":
            shapes[f"{block}.attn.{projection}.weight"] = (inner, TEXT_WIDTH)
        shapes[f"{block}.attn.o.weight"] = (TEXT_WIDTH, inner)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, num_heads)
        shapes[f"{block}.ffn.gate.0.weight"] = shapes[f"{block}.ffn.fc1.weight"] = (ffn_size, TEXT_WIDTH)
        shapes[f"{block}.ffn.fc2.weight"] = (TEXT_WIDTH, ffn_size)
    return shapes


def vae_shapes(base: int = 8) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Wan2.1 VAE `base` channels wide, read off the engine's own module on the meta device."""
    from lightx2v.vae.wan import WanVAE, WanVAEConfig

    with torch.device("meta"):
        module = WanVAE(WanVAEConfig(base_channels=base))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def train_tokenizer() -> bytes:
    """A sentencepiece model of about a hundred pieces with umT5's special ids: pad 0, end 1, unknown 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 5),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _random(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices of standard deviation fan_in^-1/2, norms near one, biases small: activations keep their size."""
    tensors = {}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator)
        affine = "norm" in name.rsplit(".", 2)[-2] or name.startswith(("img_emb.proj.0", "img_emb.proj.4"))
        if (affine and name.endswith("weight")) or name.endswith("gamma"):
            tensors[name] = 1 + 0.1 * normal
        elif name.endswith(("bias", "modulation", "emb_pos")):
            tensors[name] = 0.1 * normal
        elif name == "token_embedding.weight":
            tensors[name] = normal
        else:
            fan_in = torch.Size(shape[1:]).numel()
            tensors[name] = normal * fan_in**-0.5
    return tensors


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
