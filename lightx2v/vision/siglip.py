"""SigLIP so400m/14 at 384 pixels, the image encoder of HunyuanVideo-1.5's image-to-video: transformers' network."""

import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, assign, block_numbers, read_header
from lightx2v.kinds import in_words
from lightx2v.layout import plain_dtype
from lightx2v.library import from_transformers
from lightx2v.quant import find_packed
from lightx2v.text.resting import Widened
from lightx2v.vision.clip import DTYPES, ImageFeatures, OnBlock, preprocess, watched

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

MEAN = STD = (0.5, 0.5, 0.5)  # google/siglip-so400m-patch14-384, preprocessor_config.json
HEAD_DIM = 72  # 1152 channels, 16 heads there; no shape in a file tells it
NORM_EPS = 1e-6
PREFIX = "vision_model."
POSITIONS = "embeddings.position_embedding.weight"
PROBE = "head.probe"  # of the pooling head, which CLIP has not and nobody reads here
NEEDED = "use sigclip_vision_patch14_384.safetensors (ComfyUI) or the image_encoder folder of HunyuanVideo-1.5"
_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """What the shapes in a header say about the encoder."""

    hidden_size: int
    ffn_size: int
    num_layers: int
    patch_size: int  # pixels a side
    grid: int  # patches a side

    @property
    def image_size(self) -> int:
        """Pixels a side of the square that the network sees: 384 leaves 6 over, beyond the last of 27 patches."""
        return self.grid * self.patch_size + (6 if (self.grid, self.patch_size) == (27, 14) else 0)


@dataclass(frozen=True)
class ImageEncoder:
    """A loaded image encoder. path: for messages. model: holds every weight; may be moved between devices."""

    path: Path
    size: Sizes
    model: "SiglipVisionModel"

    def encode(
        self, image: Tensor, *, crop: str = "none", resize: str = "comfyui", on_block: OnBlock | None = None
    ) -> Tensor:
        """Images (B, H, W, 3), RGB in [0, 1] -> what HunyuanVideo-1.5 reads: (B, 729, 1152), float32.

        crop, resize: see `lightx2v.vision.clip.preprocess`; the defaults are what SigLIP was trained with.
        """
        return self.features(image, crop=crop, resize=resize, on_block=on_block).last

    @torch.no_grad()
    def features(
        self, image: Tensor, *, crop: str = "none", resize: str = "comfyui", on_block: OnBlock | None = None
    ) -> ImageFeatures:
        """As `encode`, with all that ComfyUI's CLIP_VISION_OUTPUT holds; `last` and `embedding` are both the tokens
        after the last norm, as there.

        Raises ValueError for a tensor that is no image, CheckpointError where the weights give infinities or NaN.
        """
        weight, sizes = next(self.model.parameters()), self.size
        pixels = preprocess(image.to(weight.device), sizes.image_size, crop=crop, resize=resize, mean=MEAN, std=STD)
        with watched(_tower(self.model).encoder.layers, on_block) as seen:
            last = self.model(pixel_values=pixels).last_hidden_state
        if not torch.isfinite(last).all():
            cause = "the file is damaged" if torch.isfinite(pixels).all() else "the image holds NaN or infinities"
            raise CheckpointError(f"{self.path}: the image encoder gave infinities or NaN: {cause}")
        return ImageFeatures(seen["before"], last, last)


def open_encoder(path: Path) -> tuple[Header, Sizes]:
    """The header of a SigLIP image encoder, without what is in front of its names, and its sizes.

    Raises CheckpointError for any other file.
    """
    header = read_header(path)
    prefix = next((prefix for prefix in (PREFIX, "") if prefix + PROBE in header.tensors), None)
    if prefix is None:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not SigLIP; {NEEDED}")
    tower = {name: name.removeprefix(prefix) for name in header.tensors if name.startswith(prefix)}
    header = find_packed(header.renamed(tower)).header
    return header, _sizes(header)


def _sizes(header: Header) -> Sizes:
    layers = block_numbers(header.path, header.tensors, _LAYER)
    positions, hidden_size = _shape(header, POSITIONS, 2)
    patch = _shape(header, "embeddings.patch_embedding.weight", 4)
    ffn_size, _ = _shape(header, "encoder.layers.0.mlp.fc1.weight", 2)
    grid = isqrt(positions)
    if layers != set(range(len(layers))) or grid**2 != positions or hidden_size % HEAD_DIM:
        raise CheckpointError(
            f"{header.path}: a SigLIP of another kind, or a damaged one ({len(layers)} layers, {positions} tokens, "
            f"{hidden_size} channels; HunyuanVideo-1.5 needs 27, 729 and 1152): {NEEDED}"
        )
    return Sizes(hidden_size, ffn_size, len(layers), patch[2], grid)


def _shape(header: Header, name: str, rank: int) -> tuple[int, ...]:
    shape = header.shape(name) or ()
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{header.path}: '{name}' is {list(shape) or 'missing'}; {NEEDED}")
    return shape


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> ImageEncoder:
    """Load SigLIP from ComfyUI's file, transformers' file or a folder.

    dtype: how the weights are held; None as in the file. Arithmetic is always float32.
    Raises CheckpointError, before any weight is read, for files that are damaged, incomplete or another model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(map(str, DTYPES))}, or None for the file's own")
    header, size = open_encoder(Path(path))
    model = empty(size)
    tower = _tower(model)
    restored = {name for name, info in header.tensors.items() if info.packed}

    def held(name: str) -> torch.dtype | None:
        return dtype or (plain_dtype(header) if name in restored else None)

    assign(tower, header, rename=used, dtype=held, device=device)
    # Not in any file, and without numbers on the meta device.
    tower.embeddings.position_ids = torch.arange(size.grid**2, device=device)[None]
    for name in ("embeddings", "post_layernorm"):
        setattr(tower, name, Widened(getattr(tower, name)))
    for index, layer in enumerate(tower.encoder.layers):
        tower.encoder.layers[index] = Widened(layer)
    return ImageEncoder(header.path, size, model.eval().requires_grad_(False))


def used(name: str) -> str | None:
    """The network's name of a tensor; None for the pooling head and for numbers that older files carry."""
    return None if name.startswith("head.") or name.endswith("position_ids") else name


def empty(size: Sizes) -> "SiglipVisionModel":
    """The network on the meta device, without its pooling head."""
    make_config, make_network = from_transformers("SiglipVisionConfig", "SiglipVisionModel")
    config = make_config(
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_DIM,
        image_size=size.image_size,
        patch_size=size.patch_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=NORM_EPS,
        vision_use_head=False,
        attn_implementation="sdpa",  # read by PreTrainedConfig
    )
    with torch.device("meta"):
        return make_network(config)


def _tower(model: nn.Module) -> Any:
    """Where the layers are: transformers before 5 has a module of the name around them."""
    return getattr(model, "vision_model", model)


def activation_bytes(size: Sizes, images: int) -> int:
    """Beside the weights, for that many images at once: one block in float32, and the widest rows of all tokens."""
    block = 4 * size.hidden_size**2 + 2 * size.hidden_size * size.ffn_size
    row = 8 * size.hidden_size + 2 * size.ffn_size
    return 4 * (block + images * size.grid**2 * row)
