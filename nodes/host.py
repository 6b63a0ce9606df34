"""The seam to ComfyUI: files, memory, progress, cancel. Facts about the host live here and nowhere else."""

import logging
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError
from lightx2v.preview import Colours, LoopingPicture, latent_to_rgb
from lightx2v.sampling import Step

log = logging.getLogger("lightx2v")
Model = io.Custom("LIGHTX2V_MODEL")
TextEncoder = io.Custom("LIGHTX2V_TEXT_ENCODER")
_SCHEMA_FIELDS = {field.name for field in fields(io.Schema)}
PREVIEW_WIDTH = 384  # pixels
DEMO = Path(__file__).resolve().parent.parent / "demo" / "models"
DEMO_PREFIX = "lightx2v-demo/"


def schema(**known: Any) -> io.Schema:
    """io.Schema without the fields that this ComfyUI does not have yet."""
    return io.Schema(**{name: value for name, value in known.items() if name in _SCHEMA_FIELDS})


def advanced(given: io.Input) -> io.Input:
    """Mark an input as one that the newer interface folds away; older ones ignore it."""
    given.extra_dict = {**(getattr(given, "extra_dict", None) or {}), "advanced": True}
    return given


def files(category: str, fits: Callable[[Path], bool]) -> list[str]:
    """The names in a model folder (and its extra_model_paths) that `fits` accepts; each file is asked once.

    The small models that the pack carries come last, as "lightx2v-demo/...".
    """
    found = {name: folder_paths.get_full_path(category, name) for name in folder_paths.get_filename_list(category)}
    found |= {
        DEMO_PREFIX + path.relative_to(DEMO).as_posix(): str(path) for path in sorted(DEMO.rglob("*.safetensors"))
    }
    return [name for name, path in found.items() if path is not None and _fits(fits, path, *_version(path))]


@lru_cache(maxsize=4096)
def _fits(fits: Callable[[Path], bool], path: str, size: int, modified: int) -> bool:
    try:
        return fits(Path(path))
    except (CheckpointError, OSError) as error:
        log.debug("not offered: %s", error)
        return False


def _version(path: str) -> tuple[int, int]:
    try:
        stat = Path(path).stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def locate(category: str, name: str) -> Path:
    """Full path of a picked file; raises FileNotFoundError naming it where it is gone."""
    if name.startswith(DEMO_PREFIX):
        return demo_file(name.removeprefix(DEMO_PREFIX))
    return Path(folder_paths.get_full_path_or_raise(category, name))


def demo_file(name: str) -> Path:
    path = (DEMO / name).resolve()
    if not path.is_relative_to(DEMO) or not path.is_file():
        raise FileNotFoundError(f"{DEMO_PREFIX}{name}: this pack carries no such model; pick one from the list")
    return path


def fingerprint(category: str, name: str) -> tuple[str, int, int]:
    """Changes when the file does, so that a loader runs again."""
    try:
        return (name, *_version(str(locate(category, name))))
    except FileNotFoundError:
        return (name, 0, 0)


class Housed(nn.Module):
    """A network inside a module of the host's own to write on: ComfyUI keeps its books as attributes of the module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class EngineHandle(comfy.model_patcher.ModelPatcher):
    """A network of ours in ComfyUI's books: it can be asked for, evicted by other models and freed.

    It moves as a whole. `model.model_loaded_weight_memory` always says how many bytes are on the load device.
    """

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        self.model.to(device_to)
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        return self.model_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        return 0  # nothing less than all of it; the host then calls detach

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:
            self.model.to(self.offload_device)
            self.model.device = self.offload_device
            self.model.model_loaded_weight_memory = 0
        return self.model


def on_gpu(handle: comfy.model_patcher.ModelPatcher, activation_bytes: int) -> torch.device:
    """Bring a handle's weights to its device, evicting others for them and for `activation_bytes` beside them."""
    mm.load_models_gpu([handle], memory_required=activation_bytes)
    return handle.load_device


def back_to_ram(handle: comfy.model_patcher.ModelPatcher) -> None:
    """Take a handle off its device now, and out of the host's list of loaded models."""
    if handle.load_device != handle.offload_device:
        mm.free_memory(1e30, handle.load_device, keep_loaded=_all_but(handle))


def _all_but(handle: comfy.model_patcher.ModelPatcher) -> list[Any]:
    return [loaded for loaded in mm.current_loaded_models if loaded.model is not handle]


def cancel_point(*_: Any) -> None:
    """Raise the host's InterruptProcessingException once the user has pressed cancel."""
    mm.throw_exception_if_processing_interrupted()


def progress() -> Callable[[int, int], None]:
    """A progress bar on the running node: call with (done, total). Each call is a cancel point."""
    bar = comfy.utils.ProgressBar(1)

    def update(done: int, total: int) -> None:
        cancel_point()
        bar.update_absolute(done, total)

    return update


def wan_colours() -> Colours:
    """How latents of Wan's own VAE look, as the host's previews have it."""
    space = comfy.latent_formats.Wan21()
    return Colours(space.latent_rgb_factors, space.latent_rgb_factors_bias)


def step_progress(steps: int, colours: Colours) -> Callable[[Step, Tensor], None]:
    """Progress with a looping preview of the video so far."""
    bar = comfy.utils.ProgressBar(steps)
    show = mm.args.preview_method.value != "none" if hasattr(mm.args, "preview_method") else True

    def update(step: Step, x0: Tensor) -> None:
        cancel_point()
        preview = None
        if show:
            frames = latent_to_rgb(x0, colours)
            preview = ("PNG", LoopingPicture(frames, PREVIEW_WIDTH), None)
        bar.update_absolute(step.index + 1, step.total, preview)

    return update
