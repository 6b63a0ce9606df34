"""Stage 4 for HunyuanVideo-1.5: the trained weights as files of Tencent's folder, the transformer as a GGUF file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from demo.chat_tokenizer import FILES
from demo.stages.export import save_half
from demo.stages.fp8 import FP8, write
from demo.stages.gguf import write_gguf
from demo.stages.run import Run
from demo.stages.t2v15 import fresh, is_rounded
from demo.stages.vae15 import is_rounded as is_kernel
from lightx2v.text.qwen import SKIPPED_BLOCKS
from lightx2v.vae.hunyuan15 import HunyuanVAE

TRANSFORMER = "hunyuanvideo1.5_128p_t2v-Q4_0.gguf"
EXACT = "transformer_fp16.safetensors"  # as trained, for other layouts; not shipped
TEXT_ENCODER = "text_encoder/llm/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ARCHITECTURE = "hyvid"  # what ComfyUI-GGUF calls this family


def export_vae(vae: HunyuanVAE, folder: Path) -> None:
    """Write the autoencoder under the original key names, its rounded kernels as float8_e4m3fn."""
    state = {name: value.detach().cpu() for name, value in vae.state_dict().items()}
    tensors = {name: value.to(FP8) if is_kernel(name, value) else value.half() for name, value in state.items()}
    write(tensors, folder / VAE, {"format": "pt"})


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of a block as one layer, as in the files that ComfyUI's people repackage."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"(double_blocks\..+_attn_)([qkv])(\.(?:weight|bias))", name):
            if match[2] == "q":
                found[f"{match[1]}qkv{match[3]}"] = torch.cat([weights[f"{match[1]}{x}{match[3]}"] for x in "qkv"])
        else:
            found[name] = weight
    return found


def write_transformer(weights: Mapping[str, Tensor], path: Path) -> int:
    """Write the transformer's weights as a GGUF file in Q4_0; returns its bytes."""
    layers = merged(weights)
    return write_gguf(layers, path, ARCHITECTURE, [name for name, value in layers.items() if is_rounded(name, value)])


def with_last_blocks(encoder: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The language model's weights under transformers' names, with the blocks and the norm behind what is read: without
    them no file is one of Qwen2.5-VL. They are not trained."""
    blocks = {int(match[1]) for name in encoder if (match := re.match(r"layers\.(\d+)\.", name))}
    weights = dict(encoder)
    for index in range(len(blocks), len(blocks) + SKIPPED_BLOCKS):
        for name, weight in encoder.items():
            if name.startswith("layers.0."):
                own = name.replace("layers.0.", f"layers.{index}.")
                weights[own] = fresh(own, weight.shape, generator.device, generator)
    weights["norm.weight"] = torch.ones(encoder["embed_tokens.weight"].shape[1])
    return {f"model.{name}": weight for name, weight in weights.items()}


def export_t2v(run: Run, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write transformer, text encoder and tokenizer; `weights` are named encoder.* and transformer.*."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    transformer = part("transformer.")
    save_half(transformer, folder / EXACT)
    write_transformer(transformer, folder / TRANSFORMER)
    save_half(with_last_blocks(part("encoder."), run.generator(8)), folder / TEXT_ENCODER)
    for name in FILES:
        shutil.copyfile(run.state / "tokenizer" / name, (folder / TEXT_ENCODER).parent / name)
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != EXACT}
    run.report("bytes", {**sizes, "sum": sum(sizes.values())})
