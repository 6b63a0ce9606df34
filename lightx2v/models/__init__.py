"""Every model family is a folder here whose `spec.py` defines SPECS, and `names.py` DIALECTS. Adding a folder adds the
family."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lightx2v.cache.figures import Figures
from lightx2v.cache.turn import TimeSignal
from lightx2v.checkpoint import Header
from lightx2v.folder import ModelFolder
from lightx2v.frames import ImageCondition
from lightx2v.guidance import Conditioning
from lightx2v.latents import LatentFormat
from lightx2v_kernels import Kernels


class TextEncoder(Protocol):
    """Prompts to what a family's transformers read of them. model: its weights, which may move between two calls."""

    @property
    def model(self) -> nn.Module: ...
    def condition(self, prompt: str, *, on_block: Callable[[int, int], None] | None = None) -> Conditioning: ...


class ImageEncoder(Protocol):
    """Pictures (B, H, W, 3) in [0, 1] to tokens (B, I, image_dim)."""

    @property
    def model(self) -> nn.Module: ...
    def encode(self, image: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Encoders:
    """A family's encoders.

    text, image: read from a model folder to the CPU, or from another file than the folder's.
    quantised_text, quantised_image: names of their 8-bit files, {0} for "fp8" or "int8".
    text_scheme, image_scheme: how a file of them is quantised, from its header; "" where it is not.
    """

    text: Callable[[ModelFolder, Path | None], TextEncoder]
    image: Callable[[ModelFolder, Path | None], ImageEncoder]
    quantised_text: tuple[str, ...]
    quantised_image: tuple[str, ...]
    text_scheme: Callable[[Path], str]
    image_scheme: Callable[[Path], str]


@dataclass(frozen=True)
class ImageInput:
    """How a family reads given frames through input channels beside the latents: (encode, video, space, start=, end=)
    to an ImageCondition, and (concat_latent_image, concat_mask, space, shape) as ComfyUI carries it to those channels.
    """

    condition: Callable[..., ImageCondition]
    channels: Callable[..., Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """One variant of a family: how its checkpoint is recognised and how its network is built."""

    name: str
    title: str  # in words, for people
    family: str
    task: str
    matches: Callable[[Header], bool]
    config: Callable[[Header], Any]  # header -> the family's frozen config
    build: Callable[[Any, Kernels], nn.Module]  # config, kernels -> network, on the current default device
    keep_float32: Callable[[str], bool]  # parameter name -> stays float32 whatever the compute dtype
    quantises: Callable[[str], bool]  # name of a linear layer -> may multiply in 8 bits
    head_dim: int
    latents: LatentFormat
    patch_size: tuple[int, int, int]  # latent cells per token along (T, H, W)
    encoders: Encoders
    arguments: Callable[..., Mapping[str, Any]]  # Conditioning of a batch, step_end= -> what the network is called with
    image_input: ImageInput | None = None  # input channels beside the latents; None: the model has none
    reads_clip: bool = False  # has a place for an image encoder's tokens
    shows_cut: bool = False  # the image encoder sees a picture as it is cut for the video
    image_states: str = "penultimate_hidden_states"  # which of ComfyUI's CLIP_VISION_OUTPUT they are
    keeps_frames: bool = False  # a given frame is kept clean among the latents, at timestep 0 (Wan2.2 TI2V)
    fps: int = 16  # frames a second that it was trained on
    # (task, whether no guidance is needed, other arguments) -> what create_generator takes where nothing is said
    usual: Callable[[str, bool, Mapping[str, Any]], Mapping[str, Any]] = lambda task, distilled, asked: {}
    size_for_image: Callable[[int, tuple[int, int]], tuple[int, int]] | None = None  # None: `shapes.size_for_image`
    boundary: float | None = None  # sigma from which on down the low-noise expert takes over, where there are two
    time_signal: TimeSignal | None = None  # what TeaCache reads of the timestep; None: no feature caches
    figures: Mapping[str, Figures] = field(default_factory=dict)  # published; key: what tells checkpoints of one layout


@dataclass(frozen=True)
class Dialect:
    """A layout that another project has for a family's checkpoints, and how it is read as the family's own."""

    format: str  # "diffusers", "comfyui"
    matches: Callable[[Header], bool]
    translate: Callable[[Header], Header]


@cache
def specs() -> tuple[ModelSpec, ...]:
    """All variants of all families, in order of family name."""
    return tuple(spec for family in _families() for spec in importlib.import_module(f"{family}.spec").SPECS)


def encoders_of(family: str) -> Encoders:
    """Those of a family of `ModelSpec.family`."""
    return next(spec.encoders for spec in specs() if spec.family == family)


@cache
def dialects() -> tuple[Dialect, ...]:
    """All layouts of others of all families, in order of family name."""
    return tuple(dialect for family in _families() for dialect in importlib.import_module(f"{family}.names").DIALECTS)


def _families() -> list[str]:
    return [f"{__name__}.{family.name}" for family in pkgutil.iter_modules(__path__)]
