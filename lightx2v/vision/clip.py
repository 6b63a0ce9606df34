"""Wan2.1's image encoder: the vision transformer of open-clip's XLM-RoBERTa ViT-H/14, and how it is shown a picture."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightx2v.checkpoint import CheckpointError, Header, read_header, read_tensors
from lightx2v.config import one_of
from lightx2v.vision.layout import QUANTISED, Sizes, convert, shapes, sizes, weights

log = logging.getLogger(__name__)

# Of the pictures that CLIP was trained on (openai/CLIP, clip/clip.py), RGB in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5  # of every layer norm
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CROPS = ("none", "center")
RESIZES = ("wan", "comfyui")

# Called before each block with (index, number of blocks); raise from it to cancel.
OnBlock = Callable[[int, int], None]


class Attention(nn.Module):
    """Self-attention over all tokens, heads of 80."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        # (B, L, D) -> (B, heads, L, head_dim)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, ffn_size), nn.Linear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU: only OpenAI's own ViTs have the sigmoid one


class Block(nn.Module):
    def __init__(self, size: Sizes) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(size.hidden_size, EPS)
        self.self_attn = Attention(size.hidden_size, size.num_heads)
        self.layer_norm2 = nn.LayerNorm(size.hidden_size, EPS)
        self.mlp = FeedForward(size.hidden_size, size.ffn_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches and a class token, each with its place."""

    def __init__(self, size: Sizes) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(size.hidden_size))
        self.patch_embedding = nn.Conv2d(3, size.hidden_size, size.patch_size, size.patch_size, bias=False)
        self.position_embedding = nn.Embedding(size.grid**2 + 1, size.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).mT  # (B, D, h, w) -> (B, h w, D)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1)
        return tokens + self.position_embedding.weight


class Blocks(nn.Module):
    """Holds the place of `encoder` in the names; the blocks are run one by one from outside."""

    def __init__(self, size: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(size) for _ in range(size.num_layers))


class VisionTransformer(nn.Module):
    """The network, with the key names of transformers' CLIPVisionModel.

    Weights rest in their own dtype and are float32 only while their block runs, as ComfyUI computes, so that every kind
    of file encodes alike. The price is one block's float32 weights at a time: 79 MB for ViT-H.
    """

    def __init__(self, size: Sizes) -> None:
        super().__init__()
        self.size = size
        self.embeddings = Embeddings(size)
        self.pre_layrnorm = nn.LayerNorm(size.hidden_size, EPS)  # so it is spelt in every file
        self.encoder = Blocks(size)
        self.post_layernorm = nn.LayerNorm(size.hidden_size, EPS)
        projected = size.projection_size
        self.visual_projection = nn.Linear(size.hidden_size, projected, bias=False) if projected else nn.Identity()

    def forward(self, pixels: Tensor, on_block: OnBlock | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, S, S), normalised -> hidden states before and after the last block, each (B, L, D), and the
        picture's place in the joint space with text (B, projection_size, or D where the file has no projection)."""
        x = penultimate = _widened(self.pre_layrnorm, _widened(self.embeddings, pixels.float()))
        for index, block in enumerate(self.encoder.layers):
            if on_block is not None:
                on_block(index, self.size.num_layers)
            penultimate, x = x, _widened(block, x)
        pooled = _widened(self.post_layernorm, x[:, 0])
        return penultimate, x, _widened(self.visual_projection, pooled)


def _widened(module: nn.Module, x: Tensor) -> Tensor:
    return functional_call(module, {name: weight.float() for name, weight in module.named_parameters()}, (x,))


@dataclass(frozen=True)
class ImageFeatures:
    """What a picture became, float32, on the encoder's device.

    penultimate: (B, L, D) the hidden states before the last block, which is what Wan reads; L = 257, D = 1280.
    last: (B, L, D) after it. Neither has gone through the last layer norm.
    embedding: (B, 1024) in the joint space with text, or (B, D) before the projection where the file has none.
    """

    penultimate: Tensor
    last: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class ImageEncoder:
    """A loaded image encoder.

    path: the checkpoint, for messages.
    model: holds every weight; it may be moved between devices between two calls.
    """

    path: Path
    model: VisionTransformer

    def encode(
        self, image: Tensor, *, crop: str = "none", resize: str = "wan", on_block: OnBlock | None = None
    ) -> Tensor:
        """Images (B, H, W, 3), RGB in [0, 1] -> what Wan2.1 reads: hidden states (B, 257, 1280), float32.

        crop, resize: see `preprocess`. Raises as `features` does.
        """
        return self.features(image, crop=crop, resize=resize, on_block=on_block).penultimate

    @torch.no_grad()
    def features(
        self, image: Tensor, *, crop: str = "none", resize: str = "wan", on_block: OnBlock | None = None
    ) -> ImageFeatures:
        """As `encode`, with all that ComfyUI's CLIP_VISION_OUTPUT holds.

        Raises ValueError for a tensor that is no image, CheckpointError where the weights give infinities or NaN.
        """
        weight = self.model.embeddings.class_embedding
        pixels = preprocess(image.to(weight.device), self.model.size.image_size, crop=crop, resize=resize)
        found = ImageFeatures(*self.model(pixels, on_block))
        if not torch.isfinite(found.last).all():
            cause = "the file is damaged" if torch.isfinite(pixels).all() else "the image holds NaN or infinities"
            raise CheckpointError(
                f"{self.path}: the image encoder gave infinities or NaN (arithmetic in float32, weights held in "
                f"{weight.dtype}): {cause}"
            )
        return found


def preprocess(image: Tensor, size: int, *, crop: str = "none", resize: str = "wan") -> Tensor:
    """Images (B, H, W, 3) or with alpha, which is dropped, in [0, 1] -> pixels (B, 3, size, size), normalised, float32.

    crop: "none" squeezes the whole picture into the square, as Wan does (Wan-Video/Wan2.1, wan/modules/clip.py), so
        that its edges are seen too; "center" scales the short side and cuts the long one.
    resize: "wan" is bicubic with no filter before it, and no rounding. "comfyui" filters first (antialias) and rounds
        to 8 bits, as ComfyUI's CLIPVisionEncode does (comfy/clip_vision.py). The two differ where a large picture has
        fine detail. The defaults are what Wan's own programme shows the model.
    Raises ValueError for another shape, and for names that are none of these.
    """
    one_of("crop", crop, CROPS)
    one_of("resize", resize, RESIZES)
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"the image is {tuple(image.shape)}; expected (B, H, W, 3), RGB in [0, 1]")
    x = image[..., :3].movedim(-1, 1).float()
    if x.shape[-2:] != (size, size):
        shorter = min(x.shape[-2:])
        target = [round(size / shorter * side) for side in x.shape[-2:]] if crop == "center" else [size, size]
        x = F.interpolate(x, size=target, mode="bicubic", align_corners=False, antialias=resize == "comfyui")
        top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
        x = x[:, :, top : top + size, left : left + size]
    if resize == "comfyui":
        x = (x * 255).clamp(0, 255).round() / 255
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> ImageEncoder:
    """Load the image encoder of Wan2.1 from any layout that `lightx2v.vision.layout` names.

    path: a file, or the image_encoder folder of a diffusers model.
    dtype: how the weights are held (float32, bfloat16, float16; None as in the file, float16 for quantised ones, which
        are expanded while loading). Arithmetic is always float32.
    Raises CheckpointError, before any weight is read, for files that are damaged, incomplete or another model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(map(str, DTYPES))}, or None for the file's own")
    header = read_header(path)
    size = sizes(header)
    with torch.device("meta"):
        model = VisionTransformer(size)
    _check(header, model)
    if any(header.tensors[name].dtype in QUANTISED for name in weights(header)):
        log.info("%s: 8-bit weights, held as %s from here on", header.path.name, dtype or torch.float16)
    model.load_state_dict(dict(_read(header, dtype, device)), assign=True)
    return ImageEncoder(header.path, model.eval().requires_grad_(False))


def _check(header: Header, model: nn.Module) -> None:
    """Every tensor of the network is in the file, in its shape, and nothing else is."""
    found = shapes(header)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = next((name for name in sorted(expected) if found.get(name) != expected[name]), None)
    if wrong is not None:
        have = f"is {list(found[wrong])}" if wrong in found else "is missing"
        raise CheckpointError(
            f"{header.path}: tensor '{wrong}' {have}, the image encoder needs {list(expected[wrong])}; "
            "the file is incomplete or of another model"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{header.path}: {len(extra)} tensors have no place in the image encoder, first '{extra[0]}'; "
            "the file is of another model"
        )


def _read(header: Header, dtype: torch.dtype | None, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors one by one, quantised ones expanded: weight * scale of its row."""
    scale_of = weights(header)
    scales = dict(read_tensors(header, [scale for scale in scale_of.values() if scale]))
    for name, tensor in read_tensors(header, scale_of):
        held = dtype
        if scale_of[name]:
            tensor = tensor.float() * scales[scale_of[name]].float()
            held = dtype or torch.float16
        for ours, piece in convert(name, tensor):
            # copy: a mapped tensor would keep its file open and mapped for the life of the model
            yield ours, piece.to(device=device, dtype=held, copy=True, memory_format=torch.contiguous_format)


def activation_bytes(size: Sizes, images: int) -> int:
    """Beside the weights, for that many images at once: one block in float32, and the widest rows of all tokens."""
    block = 4 * size.hidden_size**2 + 2 * size.hidden_size * size.ffn_size
    row = 8 * size.hidden_size + 2 * size.ffn_size
    return 4 * (block + images * (size.grid**2 + 1) * row)
