"""Every model family is a folder here whose `spec.py` defines SPECS, and `names.py` DIALECTS. Adding a folder adds the
family."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from lightx2v.cache.figures import Figures
from lightx2v.cache.turn import TimeSignal
from lightx2v.checkpoint import Header
from lightx2v.latents import LatentFormat
from lightx2v_kernels import Kernels


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
    image_channels: int = 0  # input channels beside the latents: mask and image latents of image-to-video models
    reads_clip: bool = False  # has a place for CLIP image tokens
    keeps_frames: bool = False  # a given frame is kept clean among the latents, at timestep 0 (Wan2.2 TI2V)
    boundary: float | None = None  # sigma from which on down the low-noise expert takes over, where there are two
    time_signal: TimeSignal | None = None  # what TeaCache reads of the timestep; None: no feature caches
    figures: Mapping[str, Figures] = field(default_factory=dict)  # published; key: what tells checkpoints of one layout
    missing: str | None = None  # what of the family is not here yet, in words; such a model cannot be run


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


@cache
def dialects() -> tuple[Dialect, ...]:
    """All layouts of others of all families, in order of family name."""
    return tuple(dialect for family in _families() for dialect in importlib.import_module(f"{family}.names").DIALECTS)


def _families() -> list[str]:
    return [f"{__name__}.{family.name}" for family in pkgutil.iter_modules(__path__)]
