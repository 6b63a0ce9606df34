"""Where a HunyuanVideo-1.5 folder keeps its parts, and its encoders: Qwen2.5-VL and byT5 for prompts, SigLIP for
pictures.

Three folders are known: Tencent's own, diffusers', and one with ComfyUI's files in it.
"""

from pathlib import Path

from lightx2v.checkpoint import CheckpointError
from lightx2v.folder import MissingPartError, ModelFolder
from lightx2v.models import Encoders
from lightx2v.text import hunyuan15, qwen
from lightx2v.text.chat import tokenizer_in
from lightx2v.vision import siglip

TRANSFORMERS = "transformer"  # Tencent's folder has several models in it, diffusers' is one
TRANSFORMER = (
    "transformer",
    "diffusion_pytorch_model*.safetensors",
    *("hunyuanvideo1.5_*.safetensors", "hy1*5_*.safetensors", "diffusion_models/hunyuanvideo1.5_*.safetensors"),
    "hunyuanvideo1.5_*.gguf",
)
LANGUAGE = (
    "text_encoder/llm",
    *("qwen_2.5_vl_7b.safetensors", "qwen_2.5_vl_7b*.safetensors", "text_encoders/qwen_2.5_vl_7b*.safetensors"),
    *("hy15_qwen25vl_llm_encoder*.safetensors", "text_encoder"),
)
GLYPHS = (
    "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt",
    *("byt5_small_glyphxl*.safetensors", "text_encoders/byt5_small_glyphxl*.safetensors", "text_encoder_2"),
)
TOKENIZERS = ("text_encoder/llm", "tokenizer", "text_encoder", ".")
SIGLIP = (
    *("vision_encoder/siglip/image_encoder", "image_encoder"),
    *("sigclip_vision_patch14_384*.safetensors", "clip_vision/sigclip_vision_patch14_384*.safetensors"),
)
QUANTISED_LANGUAGE = ("*qwen25vl*{0}*.safetensors", "qwen_2.5_vl_7b*{0}*.safetensors", "text_encoders/qwen*{0}*")


def describes(folder: ModelFolder) -> bool:
    """Whether a folder has encoders that only this family has."""
    marks = ("text_encoder/llm", "text_encoder_2", "qwen_2.5_vl_7b*.safetensors", "hy15_qwen25vl*.safetensors")
    return any(any(folder.path.glob(mark)) for mark in marks)


def transformers(folder: ModelFolder) -> list[Path]:
    """Those of Tencent's folder, which holds several."""
    found = (folder.path / TRANSFORMERS).glob("*")
    return sorted(path for path in found if path.is_dir() and any(path.glob("*.safetensors")))


def tokenizer(folder: ModelFolder) -> Path | None:
    """Qwen's; None where the folder has none: then it is looked for beside the text encoder."""
    return tokenizer_in(folder.path, TOKENIZERS)


def find_transformer(folder: ModelFolder, task: str, name: str | None) -> Path:
    """The folder or file of the transformer. name: of one of Tencent's, such as "480p_t2v".

    Raises MissingPartError where there is none, CheckpointError for a name that is not there and where several fit.
    """
    within, several = folder.path / TRANSFORMERS, transformers(folder)
    names = [path.name for path in several]
    if name is not None and name not in names:
        raise CheckpointError(
            f"{within}: transformer_model_name={name!r} is not here; found {', '.join(names) or 'none'}"
        )
    if not several:
        return folder.find("transformer", TRANSFORMER)
    chosen = [path for path in several if path.name == name] if name else several
    fitting = [path for path in chosen if len(chosen) == 1 or task in path.name.split("_")]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{within} holds {', '.join(names)}: give transformer_model_name, or the folder of one of them as "
            "dit_original_ckpt"
        )
    return fitting[0]


def read_text(folder: ModelFolder, given: Path | None) -> hunyuan15.HunyuanText:
    """byT5 may be missing as long as no prompt quotes text."""
    language = given or folder.find("text encoder", LANGUAGE)
    try:
        glyphs = folder.find("glyph encoder", GLYPHS)
    except MissingPartError:
        glyphs = None
    return hunyuan15.load(language, glyphs, tokenizer=tokenizer(folder))


def read_image(folder: ModelFolder, given: Path | None) -> siglip.ImageEncoder:
    return siglip.load(given or folder.find("image encoder", SIGLIP))


def text_scheme(path: Path) -> str:
    packed = [info.packed for info in qwen.open_encoder(path)[0].tensors.values() if info.packed]
    return packed[0].scheme if packed else ""


def image_scheme(path: Path) -> str:
    packed = [info.packed for info in siglip.open_encoder(path)[0].tensors.values() if info.packed]
    return packed[0].scheme if packed else ""


ENCODERS = Encoders(
    text=read_text,
    image=read_image,
    quantised_text=QUANTISED_LANGUAGE,
    quantised_image=("sigclip*{0}*.safetensors", "siglip*{0}*.safetensors"),
    text_scheme=text_scheme,
    image_scheme=image_scheme,
)
