"""The encoders of Wan: umT5 for prompts, CLIP for the pictures of Wan2.1."""

from pathlib import Path

from lightx2v.checkpoint import read_header
from lightx2v.folder import ModelFolder
from lightx2v.models import Encoders
from lightx2v.text import umt5
from lightx2v.vision import clip
from lightx2v.vision.layout import QUANTISED, sizes, weights


def read_text(folder: ModelFolder, given: Path | None) -> umt5.UMT5:
    return umt5.load(given or folder.text_encoder(), tokenizer=folder.tokenizer())


def read_image(folder: ModelFolder, given: Path | None) -> clip.ImageEncoder:
    return clip.load(given or folder.image_encoder())


def text_scheme(path: Path) -> str:
    packed = [info.packed for info in umt5.open_encoder(path)[0].tensors.values() if info.packed]
    return packed[0].scheme if packed else ""


def image_scheme(path: Path) -> str:
    header = read_header(path)
    sizes(header)
    kinds = {str(header.tensors[name].dtype) for name in weights(header) if header.tensors[name].dtype in QUANTISED}
    return "int8" if "torch.int8" in kinds else "fp8" if kinds else ""


ENCODERS = Encoders(
    text=read_text,
    image=read_image,
    quantised_text=("models_t5_*-{0}.pth", "models_t5_*-{0}.safetensors", "models_t5_*{0}*"),
    quantised_image=("models_clip_*-{0}.pth", "models_clip_*-{0}.safetensors", "models_clip_*{0}*"),
    text_scheme=text_scheme,
    image_scheme=image_scheme,
)
