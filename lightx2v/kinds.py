"""What files are: one table of everything people have, by tensor names and shapes, in words.

Families that can be run recognise their own transformers in their spec.py; what is here names the rest, so that every
loader can say what was picked instead.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lightx2v.checkpoint import Header

Test = Callable[[Header], bool]
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")  # of transformers; a family's names follow


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    name: "lora", "transformer", "vae", "tiny autoencoder", "text encoder", "image encoder", "text mapper".
    family: whose it is: "wan2.1", "wan2.2", "wan", "hunyuan1.5", "hunyuan"; empty where it serves several or none.
    words: what it is, with its article. use: what to do with it.
    """

    name: str
    family: str
    words: str
    use: str
    matches: Test

    def describe(self) -> str:
        return f"{self.words}; {self.use}"


def _has(*names: str) -> Test:
    return lambda header: all(name in header.tensors for name in names)


def _like(pattern: str) -> Test:
    compiled = re.compile(pattern)
    return lambda header: any(compiled.search(name) for name in header.tensors)


def _both(*tests: Test) -> Test:
    return lambda header: all(test(header) for test in tests)


def _size(name: str, axis: int, *sizes: int) -> Test:
    """The tensor is there and its axis has one of these sizes."""

    def test(header: Header) -> bool:
        shape = header.shape(name)
        return shape is not None and len(shape) > axis and shape[axis] in sizes

    return test


def _some_width(width: int) -> Test:
    return lambda header: any(info.shape[-1:] == (width,) for info in header.tensors.values())


NO_LOADER = "no loader here takes it"
AS_LORA = "not a whole model: put it into models/loras and use a LoRA loader"
AS_TEXT = "load it with LightX2VLoadTextEncoder (models/text_encoders)"
NEEDS_UMT5 = "Wan needs umT5: umt5_xxl_fp16.safetensors"
AS_VAE = "load it with LightX2VLoadVAE (models/vae)"
AS_VISION = "put it into models/clip_vision"
AS_TAE = "put it into models/vae_approx"
IN_BLOCK = r"blocks[._]\d+[._](self_attn|cross_attn|attn[12]|ffn)"
T5_QUERY = r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$"
LORA = r"[._]lora[._]?(up|down|A|B|mid)\b|[._](hada_|lokr_)|\.diff(_b|_m)?$"
HY_BLOCK = r"(^|\.)double_blocks\.0\.img_attn"
BYT5_WIDTH = 1472
QWEN_WIDTH = 3584
LIGHTVAE_WIDTH = 24

# First match wins.
KINDS: tuple[Kind, ...] = (
    Kind("lora", "hunyuan1.5", "a LoRA of HunyuanVideo", AS_LORA, _both(_like(LORA), _like(r"double_blocks[._]0"))),
    Kind("lora", "wan", "a LoRA of Wan", AS_LORA, _both(_like(LORA), _like(IN_BLOCK))),
    Kind("lora", "", "a LoRA", AS_LORA, _like(LORA)),
    Kind(
        "transformer",
        "hunyuan1.5",
        "the super-resolution model of HunyuanVideo-1.5",
        "videos are not enlarged: use a text- or image-to-video model of it",
        _both(_like(HY_BLOCK), _size("img_in.proj.weight", 1, 98)),
    ),
    Kind(
        "transformer",
        "hunyuan1.5",
        "HunyuanVideo-1.5",
        "its variant is not supported yet",
        _both(_like(HY_BLOCK), _has("vision_in.proj.1.weight")),
    ),
    Kind(
        "transformer",
        "hunyuan1.5",
        "HunyuanVideo-1.5 in diffusers' layout",
        "its variant is not supported yet",
        _has("x_embedder.proj.weight", "context_embedder_2.linear_1.weight"),
    ),
    Kind("transformer", "hunyuan", "HunyuanVideo", "only version 1.5 of it is supported", _like(HY_BLOCK)),
    Kind(
        "transformer",
        "wan",
        "a Wan transformer",
        "its variant is not supported yet",
        _both(_has("patch_embedding.weight"), _like(r"^blocks\.0\.self_attn\.q\.")),
    ),
    Kind(
        "transformer",
        "wan",
        "a Wan transformer in diffusers' layout",
        "its variant is not supported yet",
        _like(r"^condition_embedder\.text_embedder\."),
    ),
    Kind(
        "text mapper",
        "hunyuan1.5",
        "the byT5 mapper of HunyuanVideo-1.5",
        "it comes with its transformer",
        lambda header: bool(header.tensors) and all(name.startswith("byt5_in.") for name in header.tensors),
    ),
    Kind(
        "tiny autoencoder",
        "wan2.1",
        "a tiny autoencoder of Wan2.1 (taew2_1, lighttaew2_1)",
        AS_TAE,
        _both(_has("decoder.3.conv.0.weight"), _size("decoder.1.weight", 1, 16)),
    ),
    Kind(
        "tiny autoencoder",
        "wan2.2",
        "a tiny autoencoder of Wan2.2 TI2V-5B (taew2_2, lighttaew2_2)",
        AS_TAE,
        _both(_has("decoder.3.conv.0.weight"), _size("decoder.1.weight", 1, 48)),
    ),
    Kind(
        "tiny autoencoder",
        "hunyuan1.5",
        "a tiny autoencoder of HunyuanVideo-1.5 (taehv1_5, lighttaehy1_5)",
        AS_TAE,
        _both(_has("decoder.3.conv.0.weight"), _size("decoder.1.weight", 1, 32)),
    ),
    Kind(
        "tiny autoencoder",
        "",
        "a tiny autoencoder of another model",
        AS_TAE,
        _has("decoder.3.conv.0.weight", "decoder.1.weight"),
    ),
    Kind(
        "vae",
        "wan2.2",
        "the Wan2.2 VAE of TI2V-5B, with 48 latent channels",
        AS_VAE,
        _both(_has("decoder.head.0.gamma"), _size("encoder.conv1.weight", 1, 12)),
    ),
    Kind(
        "vae",
        "wan2.2",
        "the Wan2.2 VAE of TI2V-5B in diffusers' layout, with 48 latent channels",
        AS_VAE,
        _both(_has("decoder.norm_out.gamma"), _size("encoder.conv_in.weight", 1, 12)),
    ),
    Kind(
        "vae",
        "wan2.1",
        "a LightVAE of Wan2.1, with 16 latent channels",
        AS_VAE,
        _both(_has("decoder.head.0.gamma"), _size("encoder.conv1.weight", 0, LIGHTVAE_WIDTH)),
    ),
    Kind(
        "vae",
        "wan2.1",
        "a Wan2.1 VAE, with 16 latent channels",
        AS_VAE,
        _has("decoder.head.0.gamma", "encoder.conv1.weight"),
    ),
    Kind(
        "vae",
        "wan2.1",
        "a Wan2.1 VAE in diffusers' layout, with 16 latent channels",
        AS_VAE,
        _has("decoder.norm_out.gamma", "encoder.conv_in.weight"),
    ),
    Kind(
        "vae",
        "hunyuan1.5",
        "the VAE of HunyuanVideo-1.5",
        AS_VAE,
        _both(_has("encoder.conv_in.conv.weight"), _size("decoder.conv_in.conv.weight", 1, 32)),
    ),
    Kind(
        "vae",
        "",
        "the autoencoder of another model",
        NO_LOADER,
        _like(r"^(first_stage_model\.)?decoder\.(conv_in|mid|up)"),
    ),
    Kind(
        "text encoder", "wan", "a umT5 text encoder", AS_TEXT, _has("token_embedding.weight", "blocks.0.attn.q.weight")
    ),
    Kind(
        "text encoder",
        "wan",
        "a umT5 text encoder",
        AS_TEXT,
        _has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    ),
    Kind("text encoder", "wan", "a umT5 text encoder", AS_TEXT, _has("enc.blk.1.attn_rel_b.weight")),
    Kind("text encoder", "", "a T5 text encoder", NEEDS_UMT5, _has("enc.blk.0.attn_q.weight")),
    Kind(
        "text encoder",
        "hunyuan1.5",
        "a byT5 text encoder (Glyph)",
        "load it beside Qwen2.5-VL, as text_encoder_2 of LightX2VLoadTextEncoder",
        _both(_like(T5_QUERY), _some_width(BYT5_WIDTH)),
    ),
    Kind("text encoder", "", "a T5 text encoder", NEEDS_UMT5, _like(T5_QUERY)),
    Kind(
        "text encoder",
        "hunyuan1.5",
        "a Qwen2.5-VL text encoder",
        AS_TEXT,
        _both(_like(r"(^|\.)layers\.0\.self_attn\.q_proj\.weight$"), _some_width(QWEN_WIDTH)),
    ),
    Kind(
        "image encoder",
        "wan2.1",
        "Wan's image encoder (CLIP ViT-H)",
        AS_VISION,
        _has("visual.transformer.0.attn.to_qkv.weight"),
    ),
    Kind(
        "image encoder",
        "hunyuan1.5",
        "SigLIP, the image encoder of HunyuanVideo-1.5",
        AS_VISION,
        _like(r"vision_model\.head\.probe$"),
    ),
    Kind(
        "image encoder",
        "wan2.1",
        "Wan's image encoder (CLIP ViT-H)",
        AS_VISION,
        _both(
            _has("vision_model.embeddings.class_embedding"),
            _size("vision_model.encoder.layers.0.self_attn.q_proj.weight", 0, 1280),
        ),
    ),
    Kind(
        "image encoder",
        "",
        "an image encoder of another model",
        "Wan needs clip_vision_h.safetensors",
        _like(r"(^|\.)vision_model\."),
    ),
    # What is only part of something known, or of another model.
    Kind("image encoder", "", "DINOv2", NO_LOADER, _like(r"^encoder\.layer\.\d+\.layer_scale")),
    Kind(
        "transformer",
        "",
        "a diffusion transformer that is incomplete or of another model",
        NO_LOADER,
        _like(r"(^|\.)(self_attn\.q|img_attn_qkv|img_attn\.qkv|attn1?\.to_q|img_in\.proj)\."),
    ),
    Kind(
        "text encoder",
        "",
        "a text encoder of another model",
        NO_LOADER,
        _like(r"(^|\.)(token_embedding|shared|embed_tokens)\.weight$"),
    ),
)


def kind_of(header: Header) -> Kind | None:
    """What a file is, or None for one that nobody here knows.

    header: with the names that `read_layout` gives, or as in the file for LoRAs.
    """
    return next((kind for kind in KINDS if kind.matches(header)), None)


def in_words(header: Header) -> str:
    """What a file is, with its article, for a message of whoever wanted something else."""
    if not header.tensors:
        return "a file without tensors"
    kind = kind_of(header) or kind_of(header.without_prefix(*PREFIXES))
    return kind.words if kind else f"unknown ({len(header.tensors)} tensors, first '{next(iter(header.tensors))}')"
