"""Names and sizes of checkpoints of Wan2.1's image encoder, the vision tower of open-clip's XLM-RoBERTa ViT-H/14.

Two layouts hold the same weights. Wan's own release names them `visual.transformer.0.attn.to_qkv.weight`, with query,
key and value in one matrix, beside the text tower that nobody needs here (Wan-Video/Wan2.1, wan/modules/clip.py);
LightX2V's 8-bit files are this layout with a `weight_scale` beside every matrix. transformers, diffusers and ComfyUI
name them `vision_model.encoder.layers.0.self_attn.q_proj.weight`. Inside, those names without `vision_model.` are used.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from lightx2v.checkpoint import CheckpointError, Header, block_numbers
from lightx2v.kinds import in_words

HEAD_DIM = 80  # of ViT-H/14: 1280 channels, 16 heads. No shape in a file tells it; every other ViT has another.
SCALE = "_scale"  # a quantised `weight` has its scale in `weight_scale`, a number for each row
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
NEEDED = (
    "use clip_vision_h.safetensors (ComfyUI), models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (Wan2.1) "
    "or the image_encoder folder of Wan2.1-I2V-14B-*-Diffusers"
)

_TOP = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
    "head": "visual_projection.weight",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_ORIGINAL_BLOCK = re.compile(r"^visual\.transformer\.(\d+)\.(.+)\.(weight|bias)$")
_OUR_BLOCK = re.compile(r"^encoder\.layers\.(\d+)\.")
# The text tower and its scale, and the numbers 0, 1, 2 ... that older versions of transformers wrote.
_UNUSED = re.compile(r"^(textual|text_model|text_projection|log_scale|logit_scale)\b|embeddings\.position_ids$")
# Wan keeps a batch axis on the embeddings, and the projection as (hidden, projected).
_RESHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "embeddings.class_embedding": lambda tensor: tensor.flatten(),
    "embeddings.position_embedding.weight": lambda tensor: tensor.flatten(0, -2),
    "visual_projection.weight": lambda tensor: tensor.mT,
}

_CLASS_TOKENS = {"visual.cls_embedding", "vision_model.embeddings.class_embedding", "embeddings.class_embedding"}


@dataclass(frozen=True)
class Sizes:
    """What the shapes in a header say about the encoder."""

    hidden_size: int = 1280
    ffn_size: int = 5120
    num_layers: int = 32
    patch_size: int = 14  # pixels a side
    grid: int = 16  # patches a side
    projection_size: int | None = 1024  # of the joint space with text; None where the file leaves it out

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM

    @property
    def image_size(self) -> int:
        """Pixels a side of the square that the network sees."""
        return self.grid * self.patch_size


def convert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of any layout -> the tensors that it holds under the network's names; nothing for what has no use here.

    Works on tensors of the meta device too, so that names and shapes are known before any weight is read.
    """
    block = _ORIGINAL_BLOCK.match(name)
    if block and block[2] == "attn.to_qkv":
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield f"encoder.layers.{block[1]}.self_attn.{part}_proj.{block[3]}", piece
    elif block:
        yield f"encoder.layers.{block[1]}.{_BLOCK.get(block[2], block[2])}.{block[3]}", tensor
    elif name.startswith("visual."):
        ours = _TOP.get(name.removeprefix("visual."), name)
        yield ours, _RESHAPE.get(ours, lambda tensor: tensor)(tensor)
    elif not _UNUSED.search(name):
        yield name.removeprefix("vision_model."), tensor


def weights(header: Header) -> dict[str, str]:
    """Every tensor of the file that holds weights -> the name of its scale, or "" for plain ones.

    Raises CheckpointError for another kind of model, in words, for types that cannot be read, and for quantised weights
    without a scale of fitting shape.
    """
    _require_encoder(header)
    found = {}
    for name, info in header.tensors.items():
        if _UNUSED.search(name) or name.removesuffix(SCALE) in header.tensors.keys() - {name}:
            continue
        scale = header.tensors.get(name + SCALE)
        if info.dtype in QUANTISED:
            rows = info.shape[:1] + (1,) * (len(info.shape) - 1)
            if scale is None or scale.shape not in (rows, ()) or scale.dtype not in PLAIN:
                found_scale = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
                raise CheckpointError(
                    f"{header.path}: '{name}' is {info.dtype} and needs '{name}{SCALE}', {list(rows)} in floating "
                    f"point; found {found_scale}; {NEEDED}"
                )
        elif info.dtype not in PLAIN:
            raise CheckpointError(f"{header.path}: '{name}' is {info.dtype}, which cannot be a weight; {NEEDED}")
        found[name] = name + SCALE if info.dtype in QUANTISED else ""
    return found


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The network's tensors that a file holds, by the network's names. Raises CheckpointError as `weights` does."""
    found = {}
    for name in weights(header):
        try:
            for ours, piece in convert(name, torch.empty(header.tensors[name].shape, device="meta")):
                found[ours] = tuple(piece.shape)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{header.path}: '{name}' has the impossible shape {list(header.tensors[name].shape)}; {NEEDED}"
            ) from error
    return found


def _require_encoder(header: Header) -> None:
    if not header.tensors.keys() & _CLASS_TOKENS:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not Wan2.1's image encoder; {NEEDED}")


def sizes(header: Header) -> Sizes:
    """Read the encoder's sizes from the shapes of a header. Raises CheckpointError for any other model."""
    found = shapes(header)
    positions, hidden_size = _matrix(header, found, "embeddings.position_embedding.weight")
    ffn_size, _ = _matrix(header, found, "encoder.layers.0.mlp.fc1.weight")
    patch = found.get("embeddings.patch_embedding.weight", ())
    layers = block_numbers(header.path, found, _OUR_BLOCK)
    grid = isqrt(max(positions - 1, 0))
    if layers != set(range(len(layers))) or len(layers) < 2:
        raise CheckpointError(
            f"{header.path}: expected layers 0, 1, 2 ... without a gap, found {len(layers)} with numbers up to "
            f"{max(layers, default=None)}; download the file again"
        )
    if hidden_size % HEAD_DIM or len(patch) != 4 or patch[2] != patch[3] or not grid or grid * grid + 1 != positions:
        raise CheckpointError(
            f"{header.path}: an image encoder of another kind ({hidden_size} channels, {positions} tokens, patches of "
            f"{list(patch[2:])} pixels); Wan2.1 needs ViT-H/14 (1280 channels, 257 tokens, 14 pixels): {NEEDED}"
        )
    projection = found.get("visual_projection.weight")
    return Sizes(hidden_size, ffn_size, len(layers), patch[2], grid, projection[0] if projection else None)


def _matrix(header: Header, found: dict[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = found.get(name, ())
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{header.path}: '{name}' is {list(shape) or 'missing'}, expected a matrix; {NEEDED}")
    return shape[0], shape[1]
