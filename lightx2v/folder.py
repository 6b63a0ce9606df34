"""A model folder in Wan's own layout: which file is the transformer, the text encoder, the VAE, the tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from lightx2v.checkpoint import CheckpointError

TRANSFORMER = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model*.safetensors")
TEXT_ENCODER = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_*.pth", "models_t5_*.safetensors")
VAE = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
TOKENIZER = "google/umt5-xxl"


@dataclass(frozen=True)
class ModelFolder:
    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path | None  # None: the text encoder's own search decides


def open_folder(path: str | Path, transformer: str | Path | None = None) -> ModelFolder:
    """Find the parts of a model folder.

    transformer: a checkpoint to use instead of the folder's own.
    Raises CheckpointError naming the part that is missing and the names that were looked for.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; model_path is the folder that holds the model's files")
    tokenizer = folder / TOKENIZER
    return ModelFolder(
        transformer=Path(transformer) if transformer else _first(folder, "transformer", TRANSFORMER),
        text_encoder=_first(folder, "text encoder", TEXT_ENCODER),
        vae=_first(folder, "VAE", VAE),
        tokenizer=tokenizer if tokenizer.is_dir() else None,
    )


def _first(folder: Path, part: str, patterns: tuple[str, ...]) -> Path:
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise CheckpointError(f"{folder}: no {part} here; looked for {', '.join(patterns)}")
