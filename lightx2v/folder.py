"""A model folder, as its makers lay it out: which file is which part."""

from dataclasses import dataclass
from pathlib import Path

from lightx2v.checkpoint import CheckpointError
from lightx2v.latents import HUNYUAN15, WAN21, WAN22, LatentFormat
from lightx2v.vae.tae import KINDS

# Of LightX2V's folders: forms of the same part side by side. The full-precision one comes first here.
FORMS = ("", "original", "distill_models", "fp8", "int8", "distill_fp8", "distill_int8")
TRANSFORMER = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model*.safetensors",
    "transformer",
    "distill_model.safetensors",
    "distill_model.pt",
)
EXPERTS = {
    "high": ("high_noise_model", "*high_noise*.safetensors", "transformer"),
    "low": ("low_noise_model", "*low_noise*.safetensors", "transformer_2"),
}
TEXT_ENCODER = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_*.pth", "models_t5_*.safetensors", "text_encoder")
IMAGE_ENCODER = ("models_clip_*.pth", "models_clip_*.safetensors", "image_encoder")
VAE = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "vae")
VAE_HUNYUAN = ("hunyuanvideo15_vae*.safetensors", "vae/hunyuanvideo15_vae*.safetensors", "vae")
VAE22 = ("Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors", "vae")
LIGHT_VAE = ("lightvaew2_1.safetensors", "lightvaew2_1.pth")
TOKENIZERS = ("google/umt5-xxl", "tokenizer")


class MissingPartError(CheckpointError):
    """The folder has no file of that part."""


@dataclass(frozen=True)
class ModelFolder:
    """Finds the parts of a model. Each look-up raises MissingPartError naming the part and the names it looked for."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a folder; model_path is the folder that holds the model's files")

    def transformer(self) -> Path:
        """The one transformer of the model."""
        return self.find("transformer", TRANSFORMER)

    def expert(self, which: str) -> Path:
        """which: "high" or "low"."""
        return self.find(f"{which}-noise expert", EXPERTS[which])

    def text_encoder(self) -> Path:
        """umT5."""
        return self.find("text encoder", TEXT_ENCODER)

    def tokenizer(self) -> Path | None:
        """None where the folder has none: then the text encoder's own search decides."""
        return next((self.path / name for name in TOKENIZERS if (self.path / name).is_dir()), None)

    def image_encoder(self) -> Path:
        """CLIP, of Wan2.1 image-to-video."""
        return self.find("image encoder", IMAGE_ENCODER)

    def vae(self, space: LatentFormat) -> Path:
        """The VAE whose latents these are."""
        return self.find("VAE", {WAN22: VAE22, HUNYUAN15: VAE_HUNYUAN}.get(space, VAE))

    def light_vae(self, space: LatentFormat) -> Path:
        """LightVAE, which there is for Wan2.1's latents."""
        return self.find("LightVAE", LIGHT_VAE if space == WAN21 else ())

    def tiny_vae(self, space: LatentFormat) -> Path:
        """A tiny autoencoder of these latents."""
        kinds = [kind.name for kind in KINDS.values() if kind.space == space]
        return self.find(
            "tiny autoencoder", tuple(f"{name}{end}" for name in kinds for end in (".safetensors", ".pth"))
        )

    def find(self, part: str, patterns: tuple[str, ...]) -> Path:
        """The first file or folder that fits, in the order of FORMS and then of the patterns."""
        for form in FORMS:
            for pattern in patterns:
                if found := sorted((self.path / form).glob(pattern)):
                    return found[0]
        if not patterns:
            raise CheckpointError(f"{self.path}: there is no {part} for the latents of this model; use its own VAE")
        folders = ", ".join(form for form in FORMS if form)
        raise MissingPartError(
            f"{self.path}: no {part} here; looked for {', '.join(patterns)} there and in its subfolders {folders}"
        )
