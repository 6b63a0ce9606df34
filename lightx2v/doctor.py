"""What this machine has, which kernels can run on it, and which parts a model folder holds."""

import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lightx2v import __version__
from lightx2v.checkpoint import CheckpointError
from lightx2v.folder import ModelFolder
from lightx2v.identify import recognise
from lightx2v.latents import HUNYUAN15, WAN21, WAN22
from lightx2v.models.hunyuan_video_15 import encoders as hunyuan
from lightx2v_kernels import registry

NEEDED = ("torch", "safetensors", "transformers", "tokenizers", "sentencepiece", "einops", "av", "pillow")
OPTIONAL = (
    *("triton", "flash-attn", "flash-attn-4", "flash-attn-3", "fa3-fwd", "sageattention", "sageattn3"),
    *("sgl-kernel", "vllm", "torchao", "comfy-kitchen"),
)
Search = tuple[str, Callable[[], Path | None]]  # a part, and where it is
HEAD_DIM = 128  # of every Wan and HunyuanVideo-1.5


def machine() -> Iterator[str]:
    """Versions and devices, a line each."""
    yield f"lightx2v {__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"
    for package in (*NEEDED, *OPTIONAL):
        try:
            yield f"  {package:<15} {version(package)}"
        except PackageNotFoundError:
            yield f"  {package:<15} not installed{'' if package in NEEDED else ' (optional)'}"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        capability = f"compute capability {found.major}.{found.minor}"
        yield f"  {f'cuda:{index}':<15} {found.name}, {found.total_memory / 1e9:.1f} GB, {capability}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, but it finds no GPU" if built else "torch is built without CUDA"
        yield f"  {'device':<15} cpu ({why})"


def backends() -> Iterator[str]:
    """For every op each backend, best first: whether it runs here, or why not; then which one is taken."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    place = (device, dtype, HEAD_DIM)
    for op, found in sorted(registry.registries().items()):
        yield f"{op} backends for {device}, {str(dtype).removeprefix('torch.')}, head_dim {HEAD_DIM}:"
        for backend in found.ranked():
            why = backend.why_not(*place) or found.fault(backend, *place)
            lossy = "" if backend.max_error is None else f", lossy: within {backend.max_error:g} of fp32"
            yield f"  {backend.name:<15} {f'cannot run: {why}' if why else f'can run{lossy}'}"
        yield f"  {'auto takes':<15} {registry.select(op, 'auto', device, dtype, HEAD_DIM).name}"
        for workload in found.workloads:
            taken = registry.select(op, "exact", device, dtype, HEAD_DIM, workload).name
            yield f"  {'exact takes':<15} {taken} for {workload}-{op}"


def parts(path: Path) -> Iterator[str]:
    """What a model folder holds, part by part. Raises CheckpointError for a path that is no folder."""
    folder = ModelFolder(path)
    yield f"{path}:"
    for part, search in _hunyuan(folder) if hunyuan.describes(folder) else _wan(folder):
        yield f"  {part:<15} {_found(path, part, search)}"


def _wan(folder: ModelFolder) -> tuple[Search, ...]:
    return (
        ("transformer", folder.transformer),
        ("high-noise", lambda: folder.expert("high")),
        ("low-noise", lambda: folder.expert("low")),
        ("text encoder", folder.text_encoder),
        ("tokenizer", folder.tokenizer),
        ("image encoder", folder.image_encoder),
        ("Wan2.1 VAE", lambda: folder.vae(WAN21)),
        ("Wan2.2 VAE", lambda: folder.vae(WAN22)),
        ("LightVAE", lambda: folder.light_vae(WAN21)),
        ("Wan2.1 tiny", lambda: folder.tiny_vae(WAN21)),
        ("Wan2.2 tiny", lambda: folder.tiny_vae(WAN22)),
    )


def _hunyuan(folder: ModelFolder) -> tuple[Search, ...]:
    several = hunyuan.transformers(folder)
    one: Search = ("transformer", lambda: folder.find("transformer", hunyuan.TRANSFORMER))
    return (
        *(("transformer", partial(Path, path)) for path in several),
        *(() if several else (one,)),
        ("text encoder", lambda: folder.find("text encoder", hunyuan.LANGUAGE)),
        ("tokenizer", lambda: hunyuan.tokenizer(folder)),
        ("glyph encoder", lambda: folder.find("glyph encoder", hunyuan.GLYPHS)),
        ("image encoder", lambda: folder.find("image encoder", hunyuan.SIGLIP)),
        ("VAE", lambda: folder.vae(HUNYUAN15)),
        ("tiny", lambda: folder.tiny_vae(HUNYUAN15)),
    )


def _found(root: Path, part: str, search: Callable[[], Path | None]) -> str:
    try:
        path = search()
    except CheckpointError:  # which says the part is not there, in more words than a list has room for
        path = None
    if path is None:
        return "not here"
    name = path.relative_to(root)
    if part == "tokenizer":
        return str(name)
    try:
        return f"{name}: {recognise(path).describe()}"
    except CheckpointError as error:
        return f"{name}: cannot be used: {error}"
