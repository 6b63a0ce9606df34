"""The seam to ComfyUI: files, memory, progress, cancel. Facts about the host live here and nowhere else."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.text_encoders
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError
from lightx2v.checkpoint.folder import BLOCK, INDEX, NON_BLOCK, SHARD, indexed_files
from lightx2v.latents import HUNYUAN15, WAN22, LatentFormat
from lightx2v.preview import Colours, LoopingPicture, latent_to_rgb, tiny_to_rgb
from lightx2v.sampling import Step
from lightx2v.vae import tae
from lightx2v.vae.loading import identify_vae

log = logging.getLogger("lightx2v")
Model = io.Custom("LIGHTX2V_MODEL")
TextEncoder = io.Custom("LIGHTX2V_TEXT_ENCODER")
_SCHEMA_FIELDS = {field.name for field in fields(io.Schema)}
PREVIEW_WIDTH = 384  # pixels
DEMO = Path(__file__).resolve().parent.parent / "demo" / "models"
APPROX = "vae_approx"  # the model folder of tiny autoencoders
DEMO_PREFIX = "lightx2v-demo/"
LONGEST = 1000  # characters of a picked name, with its folders


def schema(**known: Any) -> io.Schema:
    """io.Schema without the fields that this ComfyUI does not have yet."""
    return io.Schema(**{name: value for name, value in known.items() if name in _SCHEMA_FIELDS})


def advanced(given: io.Input) -> io.Input:
    """Mark an input as one that the newer interface folds away; older ones ignore it."""
    given.extra_dict = {**(getattr(given, "extra_dict", None) or {}), "advanced": True}
    return given


def files(category: str, fits: Callable[[Path], bool]) -> list[str]:
    """The names in a model folder (and its extra_model_paths) that `fits` accepts; each file is asked once.

    The small models that the pack carries come last, as "lightx2v-demo/...". A folder that is one checkpoint (a file a
    block, or parts with an index) is listed as "name/"; of shards only the first is.
    """
    return [name for name, answer in asked(category, fits).items() if answer]


def asked(category: str, question: Callable[[Path], Any]) -> dict[str, Any]:
    """What `question` says of each checkpoint in a model folder, less those that it raises for.

    Answers are kept by path, size and time of change, so they should be small.
    """
    answers = {name: _answer(question, path, *_version(path)) for name, path in _checkpoints(category).items()}
    return {name: answer for name, answer in answers.items() if answer is not None}


def _checkpoints(category: str) -> dict[str, str]:
    """Name -> path of everything in a model folder that may be one checkpoint."""
    found: dict[str, str] = {}
    listed = set(folder_paths.get_filename_list(category))
    for root in folder_paths.get_folder_paths(category):
        below = folder_paths.recursive_search(root, excluded_dir_names=[".git"])[0]
        folders, parts = _split_checkpoints(root, below)
        for name in sorted(below):
            if name not in parts and is_first_of_set(os.path.basename(name)):
                if name in listed or name.endswith(".gguf"):
                    found.setdefault(name, os.path.join(root, name))
        for name in sorted(folders):
            found.setdefault(name + "/", os.path.join(root, name))
    shipped = sorted(path for path in DEMO.rglob("*") if path.suffix in (".safetensors", ".gguf"))
    demo = {path.relative_to(DEMO).as_posix(): str(path) for path in shipped}
    return found | {DEMO_PREFIX + name: path for name, path in demo.items()}


def _split_checkpoints(root: str, below: list[str]) -> tuple[set[str], set[str]]:
    """Folders that are one checkpoint of one file a block or part, and the files that are its parts."""
    folders: set[str] = set()
    parts: set[str] = set()
    for name in below:
        folder, file = os.path.split(name)
        if file == NON_BLOCK:
            here = [other for other in below if os.path.dirname(other) == folder]
            members = [os.path.basename(other) for other in here if BLOCK.match(os.path.basename(other))] + [file]
        elif file.endswith(INDEX):
            path = os.path.join(root, name)
            members = [part for part in _answer(indexed_files, path, *_version(path)) or () if not SHARD.match(part)]
        else:
            continue
        if len(members) > 1 and folder:
            folders.add(folder)
            parts |= {os.path.join(folder, member) for member in members}
    return folders, parts


def is_first_of_set(name: str) -> bool:
    """Whether a file stands for its checkpoint in a list: the first of its shards, or one that is no shard."""
    shard = SHARD.match(name)
    return shard is None or int(shard["index"]) == 1


@lru_cache(maxsize=4096)
def _answer(question: Callable[[Path], Any], path: str, size: int, modified: int) -> Any:
    try:
        return question(Path(path))
    except (CheckpointError, OSError) as error:
        log.debug("not offered: %s", error)
        return None


def _version(path: str) -> tuple[int, int]:
    """Bytes and time of change of a file; of a folder's files together, and of all shards of a set."""
    try:
        stats = [member.stat() for member in _members(path)]
    except OSError:
        return 0, 0
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def version(path: Path) -> tuple[str, int, int]:
    """Changes when the file does."""
    return (str(path), *_version(str(path)))


def _members(path: str) -> list[Any]:
    if os.path.isdir(path):
        return list(os.scandir(path))
    shard = SHARD.match(os.path.basename(path))
    if shard is None:
        return [Path(path)]
    beside = ((SHARD.match(entry.name), entry) for entry in os.scandir(os.path.dirname(path)))
    return [entry for match, entry in beside if match and match["stem"] == shard["stem"]]


def locate(category: str, name: str) -> Path:
    """Full path of a picked file or folder; raises FileNotFoundError naming it where it is gone.

    A name comes with a graph, from whoever can reach the server: it is looked for in the model folders alone.
    """
    if len(name) > LONGEST or not name.isprintable():
        raise FileNotFoundError(f"{ascii(name)[:100]}: no file has this name; pick one from the list")
    if name.startswith(DEMO_PREFIX):
        return demo_file(name.removeprefix(DEMO_PREFIX))
    if not name.endswith("/"):
        return Path(folder_paths.get_full_path_or_raise(category, name))
    for root in map(Path, folder_paths.get_folder_paths(category)):
        folder = root / name
        # A picked name may climb no higher than its root, wherever a link inside that may lead.
        if ".." not in folder.parts and not Path(name).anchor and folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name}: no such folder in models/{category}; pick one from the list")


def demo_file(name: str) -> Path:
    path = (DEMO / name).resolve()
    if not path.is_relative_to(DEMO) or not path.is_file():
        raise FileNotFoundError(f"{DEMO_PREFIX}{name}: this pack carries no such model; pick one from the list")
    return path


def qwen_vocabulary() -> Path:
    """The folder of Qwen2.5's tokenizer, which ComfyUI carries for its own text encoders."""
    return Path(next(iter(comfy.text_encoders.__path__))) / "qwen25_tokenizer"


def fingerprint(category: str, name: str) -> tuple[str, int, int]:
    """Changes when the file does, so that a loader runs again."""
    try:
        return (name, *_version(str(locate(category, name))))
    except OSError:
        return (name, 0, 0)


class Housed(nn.Module):
    """A network inside a module of the host's own to write on: ComfyUI keeps its books as attributes of the module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class EngineHandle(comfy.model_patcher.ModelPatcher):
    """A network of ours in ComfyUI's books: it can be asked for, evicted by other models and freed.

    It moves as a whole. `model.model_loaded_weight_memory` always says how many bytes are on the load device; while
    weights pass through it, those that are held for them.
    """

    def tell_host(self, nbytes: int) -> None:
        """How many bytes are on the load device."""
        self.model.model_loaded_weight_memory = nbytes

    def move(self, device: torch.device) -> None:
        """Take all weights to a device."""
        self.model.to(device)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        self.move(device_to)
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        return self.model_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        return 0  # nothing less than all of it; the host then calls detach

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:
            self.move(self.offload_device)
            self.model.device = self.offload_device
            self.model.model_loaded_weight_memory = 0
        return self.model


def on_gpu(handle: comfy.model_patcher.ModelPatcher, activation_bytes: int) -> torch.device:
    """Bring a handle's weights to its device, evicting others for them and for `activation_bytes` beside them."""
    mm.load_models_gpu([handle], memory_required=activation_bytes)
    return handle.load_device


def room_beside(handle: comfy.model_patcher.ModelPatcher, activation_bytes: int) -> int:
    """Bytes free on a handle's device once its weights are there and others have made way for as much as is asked."""
    return int(mm.get_free_memory(on_gpu(handle, activation_bytes)))


def room_if_all_left(handles: Sequence[comfy.model_patcher.ModelPatcher]) -> int:
    """Bytes beside these handles on their device if every other model made way, less what --reserve-vram keeps."""
    device = handles[0].load_device
    free = int(mm.get_free_memory(device))
    if device.type == "cpu":
        return free
    free -= int(mm.extra_reserved_memory())
    others = [loaded for loaded in mm.current_loaded_models if not any(loaded.model is each for each in handles)]
    return free + sum(int(loaded.model_loaded_memory()) for loaded in others if loaded.device == device)


def make_room() -> None:
    """Take every model off the device, and give back what PyTorch keeps. Only after memory ran out."""
    mm.unload_all_models()
    mm.soft_empty_cache()


def asks_for_little() -> bool:
    """Whether ComfyUI was started with --lowvram or --novram."""
    return any(getattr(mm.args, flag, False) for flag in ("lowvram", "novram"))


def keeps_on_gpu() -> bool:
    """Whether ComfyUI was started with --gpu-only or --highvram."""
    return any(getattr(mm.args, flag, False) for flag in ("gpu_only", "highvram"))


def pin_limit() -> int | None:
    """Bytes of RAM that may still be pinned; 0 with --disable-pinned-memory, None where this ComfyUI sets no limit."""
    if getattr(mm.args, "disable_pinned_memory", False):
        return 0
    most = getattr(mm, "MAX_PINNED_MEMORY", -1)
    return None if most <= 0 else max(0, int(most - getattr(mm, "TOTAL_PINNED_MEMORY", 0)))


def ram_to_spare() -> bool:
    """Whether a tenth of all RAM is free."""
    cpu = torch.device("cpu")
    return bool(mm.get_free_memory(cpu) > 0.1 * mm.get_total_memory(cpu))


def run_asking_for(name: str) -> int | None:
    """The number of the graph that runs now, if one of its nodes is given that name; None otherwise."""
    for number, item in list(_running().items()):
        if any(name in each.get("inputs", {}).values() for each in item[2].values()):
            return int(number)
    return None


def is_running(number: int) -> bool:
    return number in _running()


def _running() -> dict[int, Any]:
    """Number -> (place in the queue, id, graph, ...), of graphs that run."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    return dict(getattr(queue, "currently_running", {}))


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


def show_text(text: str, node_id: str | None) -> None:
    """Show text on a node, where the interface can; it is gone when the page is loaded again."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


def colours(space: LatentFormat) -> Colours:
    """How latents of the models' own VAEs look, as the host's previews have it."""
    formats = {WAN22: comfy.latent_formats.Wan22, HUNYUAN15: comfy.latent_formats.HunyuanVideo15}
    known = formats.get(space, comfy.latent_formats.Wan21)()
    return Colours(known.latent_rgb_factors, known.latent_rgb_factors_bias)


def picture_of(space: LatentFormat, own: Colours | None) -> Callable[[Tensor], Tensor]:
    """From latents in model space to preview frames (F, H, W, 3) uint8.

    own: the colours of a checkpoint whose latents are not Wan's. Otherwise, where the user asks for TAESD previews, a
    tiny autoencoder of models/vae_approx; and ComfyUI's colours where there is none, or no memory for it.
    """
    plain = partial(latent_to_rgb, colours=own or colours(space))
    method = getattr(mm.args, "preview_method", None)
    if own is not None or method is None or method.value != "taesd":
        return plain
    named = asked(APPROX, _tiny_channels).items()
    name = next((name for name, channels in named if channels == space.channels and _theirs(name)), None)
    if name is None:
        log.warning(
            "TAESD previews: models/vae_approx has no tiny autoencoder of this model's latents; showing colours"
        )
        return plain
    device = mm.get_torch_device()
    dtype = mm.vae_dtype(device, [torch.bfloat16, torch.float32])
    tiny = tae.load(locate(APPROX, name), dtype=dtype, device=device)

    def picture(x0: Tensor) -> Tensor:
        try:
            return tiny_to_rgb(x0, tiny)
        except mm.OOM_EXCEPTION:
            log.warning("Too little GPU memory for a TAESD preview; showing colours")
        except FloatingPointError as error:  # of the tiny autoencoder alone: the estimate itself is finite
            log.warning("No TAESD preview, showing colours: %s", error)
        return plain(x0)

    return picture


def _theirs(name: str) -> bool:
    return not name.startswith(DEMO_PREFIX)


def _tiny_channels(path: Path) -> int | None:
    """Latent channels of a tiny autoencoder; None for any other VAE."""
    info = identify_vae(path)
    return info.space.channels if info.tiny else None


def step_progress(steps: int, picture: Callable[[Tensor], Tensor]) -> Callable[[Step, Tensor], None]:
    """Progress with a looping preview of the video so far."""
    bar = comfy.utils.ProgressBar(steps)
    show = shows_previews()

    def update(step: Step, x0: Tensor) -> None:
        cancel_point()
        preview = ("PNG", LoopingPicture(picture(x0), PREVIEW_WIDTH), None) if show else None
        bar.update_absolute(step.index + 1, step.total, preview)

    return update


def shows_previews() -> bool:
    """Whether the user wants to see a video while it is made."""
    return mm.args.preview_method.value != "none" if hasattr(mm.args, "preview_method") else True


def gpus() -> int:
    """How many GPUs there are for ComfyUI; none with --cpu."""
    return torch.cuda.device_count() if mm.get_torch_device().type == "cuda" else 0
