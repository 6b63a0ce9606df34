"""What a checkpoint is, decided from its header alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightx2v.checkpoint import CheckpointError, Header, read_header
from lightx2v.models import ModelSpec, specs

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class CheckpointInfo:
    """A diffusion model's checkpoint: file, variant, network shape, storage dtype of its linear layers."""

    path: Path
    header: Header
    spec: ModelSpec
    config: Any
    dtype: torch.dtype

    def describe(self) -> str:
        """One line for logs and `inspect`."""
        size = sum(info.dtype.itemsize * torch.Size(info.shape).numel() for info in self.header.tensors.values())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec.title} ({len(self.header.tensors)} tensors, {dtype}, {size / 1e6:,.1f} MB)"


def _has(*names: str) -> Callable[[Header], bool]:
    return lambda header: all(name in header.tensors for name in names)


def _patch_channels(count: int) -> Callable[[Header], bool]:
    return lambda header: (header.shape("patch_embedding.weight") or (0, 0))[1] == count


# First match wins: files that are something, but not a model this version can sample with. Words, then how to tell.
OTHERS: tuple[tuple[str, Callable[[Header], bool]], ...] = (
    ("a diffusers-layout transformer, which is not supported yet; use the original or ComfyUI file",
     _has("condition_embedder.text_embedder.linear_1.weight")),
    ("a Wan image-to-video model, which is not supported yet; use a text-to-video model", _patch_channels(36)),
    ("Wan2.2 TI2V-5B, which is not supported yet; use a Wan2.1 text-to-video model", _patch_channels(48)),
    ("HunyuanVideo-1.5, which is not supported yet", _has("vision_in.proj.1.weight")),
    ("HunyuanVideo, which is not supported yet", _has("double_blocks.0.img_attn_q.weight")),
    ("HunyuanVideo, which is not supported yet", _has("double_blocks.0.img_attn_qkv.weight")),
    ("a Wan VAE; load it with LightX2VLoadVAE (models/vae)", _has("decoder.head.0.gamma", "conv2.weight")),
    ("a tiny autoencoder; put it into models/vae_approx", _has("decoder.1.weight", "decoder.3.conv.0.weight")),
    ("a umT5 text encoder; load it with LightX2VLoadTextEncoder (models/text_encoders)",
     _has("token_embedding.weight", "blocks.0.attn.q.weight")),
    ("a T5 text encoder; load it with LightX2VLoadTextEncoder (models/text_encoders)",
     _has("encoder.block.0.layer.0.SelfAttention.q.weight")),
    ("a LoRA, not a whole model; put it into models/loras",
     lambda header: any(re.search(r"lora_(up|down|A|B)\b", name) for name in header.tensors)),
)  # fmt: skip


def other_kind(header: Header) -> str | None:
    """What a foreign file is, in words, or None for a file nobody here knows."""
    return next((words for words, matches in OTHERS if matches(header)), None)


def identify(path: str | Path) -> CheckpointInfo:
    """Which model a checkpoint holds. Reads headers only; raises CheckpointError saying what it is instead."""
    header = read_header(path).without_prefix(*PREFIXES)
    _refuse_quantised(header)
    found = [spec for spec in specs() if spec.matches(header)]
    if len(found) == 1:
        spec = found[0]
        return CheckpointInfo(header.path, header, spec, spec.config(header), _main_dtype(header))
    if found:
        names = ", ".join(spec.name for spec in found)
        raise CheckpointError(f"{header.path}: matches several models ({names}); this is a bug, please report it")
    known = ", ".join(spec.title for spec in specs())
    kind = other_kind(header) or f"of a model that is not known ({len(header.tensors)} tensors)"
    raise CheckpointError(f"{header.path}: this file is {kind}. Supported here: {known}")


def _refuse_quantised(header: Header) -> None:
    name = next((n for n, info in header.tensors.items() if info.dtype in FP8 or info.dtype == torch.int8), None)
    if name is not None:
        raise CheckpointError(
            f"{header.path}: quantised weights ('{name}' is {header.tensors[name].dtype}) are not supported yet; "
            "use the bf16 or fp16 file"
        )


def _main_dtype(header: Header) -> torch.dtype:
    """The dtype that most bytes are stored in."""
    total: dict[torch.dtype, int] = {}
    for info in header.tensors.values():
        total[info.dtype] = total.get(info.dtype, 0) + info.dtype.itemsize * torch.Size(info.shape).numel()
    return max(total, key=lambda dtype: total[dtype])
