"""Wan2.1's image encoder, the vision tower of open-clip's XLM-RoBERTa ViT-H/14: transformers' network, shown a picture
as Wan shows it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, read_header, read_tensors
from lightx2v.config import one_of
from lightx2v.library import from_transformers
from lightx2v.text.resting import Widened, before_blocks
from lightx2v.vision.layout import QUANTISED, Sizes, convert, shapes, sizes, weights

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

log = logging.getLogger(__name__)

# Of the pictures that CLIP was trained on (openai/CLIP, clip/clip.py), RGB in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CROPS = ("none", "center")
RESIZES = ("wan", "comfyui")

# Called before each block with (index, number of blocks); raise from it to cancel.
OnBlock = Callable[[int, int], None]


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
    model: transformers' network; holds every weight and may be moved between devices between two calls. Weights rest in
        their own dtype and are float32 only while their layer runs, as ComfyUI computes, so that every kind of file
        encodes alike; for ViT-H that is 79 MB at a time.
    """

    path: Path
    size: Sizes
    model: "CLIPVisionModelWithProjection"

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
        weight = next(self.model.parameters())
        pixels = preprocess(image.to(weight.device), self.size.image_size, crop=crop, resize=resize)
        found = self._run(pixels, on_block)
        if not torch.isfinite(found.last).all():
            cause = "the file is damaged" if torch.isfinite(pixels).all() else "the image holds NaN or infinities"
            raise CheckpointError(
                f"{self.path}: the image encoder gave infinities or NaN (arithmetic in float32, weights held in "
                f"{weight.dtype}): {cause}"
            )
        return found

    def _run(self, pixels: Tensor, on_block: OnBlock | None) -> ImageFeatures:
        """Pixels (B, 3, S, S), normalised -> features. What enters and leaves the last block is seen by hooks: how the
        library itself hands over hidden states has changed between its versions."""
        layers = self.model.vision_model.encoder.layers
        with watched(layers, on_block) as seen:
            embedding = self.model(pixel_values=pixels).image_embeds
        return ImageFeatures(seen["before"], seen["after"], embedding)


@contextmanager
def watched(layers: Sequence[nn.Module], on_block: OnBlock | None) -> Iterator[dict[str, Tensor]]:
    """What goes into the last layer, "before", and what comes out of it, "after", of a pass made within."""
    seen = dict[str, Tensor]()

    def before(layer: nn.Module, given: tuple) -> None:
        seen["before"] = given[0]

    def after(layer: nn.Module, given: tuple, result: Tensor | tuple) -> None:
        seen["after"] = result[0] if isinstance(result, tuple) else result

    with ExitStack() as hooks:
        before_blocks(layers, on_block, hooks)
        hooks.callback(layers[-1].register_forward_pre_hook(before).remove)
        hooks.callback(layers[-1].register_forward_hook(after).remove)
        yield seen


def preprocess(
    image: Tensor,
    size: int,
    *,
    crop: str = "none",
    resize: str = "wan",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Images (B, H, W, 3) or with alpha, which is dropped, in [0, 1] -> pixels (B, 3, size, size), normalised, float32.

    crop: "none" squeezes the whole picture into the square, as Wan does (Wan-Video/Wan2.1, wan/modules/clip.py), so
        that its edges are seen too; "center" scales the short side and cuts the long one.
    resize: "wan" is bicubic with no filter before it, and no rounding. "comfyui" filters first (antialias) and rounds
        to 8 bits, as ComfyUI's CLIPVisionEncode does (comfy/clip_vision.py). The two differ where a large picture has
        fine detail. The defaults are what Wan's own programme shows the model.
    mean, std: of the pictures that the network was trained on.
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
    centre, spread = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return (x - centre) / spread


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
    model = empty(size)
    _check(header, model)
    if any(header.tensors[name].dtype in QUANTISED for name in weights(header)):
        log.info("%s: 8-bit weights, held as %s from here on", header.path.name, dtype or torch.float16)
    model.load_state_dict(dict(_read(header, dtype, device)), assign=True)
    vision = model.vision_model
    # Not in any file, and without numbers on the meta device.
    vision.embeddings.position_ids = torch.arange(size.grid**2 + 1, device=device)[None]
    for name in ("embeddings", "pre_layrnorm", "post_layernorm"):
        setattr(vision, name, Widened(getattr(vision, name)))
    for index, layer in enumerate(vision.encoder.layers):
        vision.encoder.layers[index] = Widened(layer)
    model.visual_projection = Widened(model.visual_projection)  # type: ignore[assignment]
    return ImageEncoder(header.path, size, model.eval().requires_grad_(False))


def empty(size: Sizes) -> "CLIPVisionModelWithProjection":
    """The network on the meta device; without a projection where the file has none."""
    make_config, make_network = from_transformers("CLIPVisionConfig", "CLIPVisionModelWithProjection")
    config = make_config(
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
        projection_dim=size.projection_size or size.hidden_size,
        hidden_act="gelu",  # exact: only OpenAI's own ViTs have the sigmoid one
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",  # read by PreTrainedConfig
    )
    with torch.device("meta"):
        model = make_network(config)
    if size.projection_size is None:
        model.visual_projection = nn.Identity()
    return model


def library_name(name: str) -> str:
    """A name of lightx2v.vision.layout -> the network's."""
    return name if name.startswith("visual_projection") else f"vision_model.{name}"


def _check(header: Header, model: nn.Module) -> None:
    """Every tensor of the network is in the file, in its shape, and nothing else is."""
    found = shapes(header)
    expected = {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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
            yield (
                library_name(ours),
                piece.to(device=device, dtype=held, copy=True, memory_format=torch.contiguous_format),
            )


def activation_bytes(size: Sizes, images: int) -> int:
    """Beside the weights, for that many images at once: one block in float32, and the widest rows of all tokens."""
    block = 4 * size.hidden_size**2 + 2 * size.hidden_size * size.ffn_size
    row = 8 * size.hidden_size + 2 * size.ffn_size
    return 4 * (block + images * (size.grid**2 + 1) * row)
