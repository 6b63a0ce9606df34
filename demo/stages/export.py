"""Stage 4: the trained weights as the files of an original Wan2.1 folder, float16."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.stages.run import Run, save_state
from lightx2v.text.layout import from_original, to_original_layout
from lightx2v.vae.tae import TinyVAE
from lightx2v.vae.wan import WanVAE

TRANSFORMER = "diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "models_t5_umt5-xxl-enc.safetensors"
VAE = "Wan2.1_VAE.safetensors"
TOKENIZER = "google/umt5-xxl/spiece.model"


def save_half(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in tensors.items()}
    for name, value in halves.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"{path.name}: '{name}' does not fit float16")
    fresh = path.with_suffix(".tmp")
    save_file(halves, fresh, metadata={"format": "pt"})
    os.replace(fresh, path)


def export_vae(vae: WanVAE, folder: Path) -> None:
    """Write the autoencoder under Wan2.1_VAE.pth's key names."""
    save_half(vae.state_dict(), folder / VAE)


def export_tae(tae: TinyVAE, path: Path) -> None:
    """Write a tiny autoencoder under taew2_1.pth's key names."""
    save_half(tae.state_dict(), path)


def import_t2v(folder: Path) -> dict[str, Tensor]:
    """The weights that `export_t2v` wrote, under the names that it took."""
    weights = {f"transformer.{name}": value for name, value in load_file(folder / TRANSFORMER).items()}
    weights |= {f"encoder.{from_original(name)}": value for name, value in load_file(folder / TEXT_ENCODER).items()}
    return weights


def import_vae(folder: Path, state: Path) -> None:
    """Let a run's state begin with the autoencoder and tokenizer of an exported folder."""
    save_state(state / "vae.pt", {name: value.float() for name, value in load_file(folder / VAE).items()})
    shutil.copyfile(folder / TOKENIZER, state / "spiece.model")


def export_t2v(run: Run, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write transformer, text encoder and tokenizer; `weights` are named encoder.* and transformer.*."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    save_half(part("transformer."), folder / TRANSFORMER)
    save_half(to_original_layout(part("encoder.")), folder / TEXT_ENCODER)
    (folder / TOKENIZER).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.state / "spiece.model", folder / TOKENIZER)
