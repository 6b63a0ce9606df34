"""What this machine has, which kernels run on it, which models fit it, and which parts a model folder holds."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from lightx2v.offload.placing import ram_bytes
from lightx2v_kernels import registry

NEEDED = ("torch", "transformers", "tokenizers", "sentencepiece", "einops", "av", "pillow")
OPTIONAL = (
    *("triton", "flash-attn", "flash-attn-4", "flash-attn-3", "fa3-fwd", "sageattention", "sageattn3"),
    *("sgl-kernel", "vllm", "torchao", "comfy-kitchen"),
)
Search = tuple[str, Callable[[], Path | None]]  # a part, and where it is
HEAD_DIM = 128  # of every Wan and HunyuanVideo-1.5


@dataclass(frozen=True)
class GPU:
    """name: of the card. total, free: bytes. capability: of CUDA."""

    device: str
    name: str
    total: int
    free: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """packages: name -> version, None where it is not installed. why_cpu: why there is no GPU; "" where there is one.
    driver: the newest CUDA that the NVIDIA driver can run; None where there is none. ram, free_ram: bytes."""

    lightx2v: str
    python: str
    system: str
    cores: int
    ram: int
    free_ram: int
    driver: str | None
    gpus: tuple[GPU, ...]
    why_cpu: str
    packages: dict[str, str | None]


@dataclass(frozen=True)
class BackendState:
    """why_not: why it cannot run here; "" where it can. self_test: "passed", "failed", or "not run" where it cannot.
    max_error: of a lossy one, against fp32. taken_by: "auto", and "exact" of an op that knows it."""

    op: str
    name: str
    why_not: str
    self_test: str
    max_error: float | None
    taken_by: tuple[str, ...]


def machine() -> Machine:
    """Versions, memory and devices."""
    free, total = ram_bytes()
    there = torch.cuda.is_available()
    built = [f"{name} {of}" for name, of in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if of]
    why_cpu = f"torch is built for {built[0]}, but finds no GPU" if built else "torch is built without CUDA"
    return Machine(
        lightx2v=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cores=os.cpu_count() or 1,
        ram=total,
        free_ram=free,
        driver=_driver() if there else None,
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count() if there else 0)),
        why_cpu="" if there else why_cpu,
        packages={package: _version(package) for package in (*NEEDED, *OPTIONAL)} | {"torch": torch.__version__},
    )


def _gpu(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return GPU(f"cuda:{index}", found.name, total, free, f"{found.major}.{found.minor}")


def _driver() -> str | None:
    code: int
    code = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # 13000 of CUDA 13.0
    return f"{code // 1000}.{code % 1000 // 10}" if code else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def place() -> tuple[torch.device, torch.dtype]:
    """The device that videos are made on if none is named, and the type they are computed in."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    return torch.device("cpu"), torch.float32


def backends() -> Iterator[BackendState]:
    """For every op each backend, best first. Those that could run prove themselves: a few seconds on a new GPU."""
    where = (*place(), HEAD_DIM)
    for op, found in sorted(registry.registries().items()):
        taken = {"auto": registry.select(op, "auto", *where).name}
        for workload in found.workloads:
            taken[f"exact for {workload}-{op}"] = registry.select(op, "exact", *where, workload).name
        for backend in found.ranked():
            cannot = backend.why_not(*where)
            fault = None if cannot else found.fault(backend, *where)
            state = "not run" if cannot else "failed" if fault else "passed"
            chosen = tuple(who for who, name in taken.items() if name == backend.name)
            yield BackendState(op, backend.name, cannot or fault or "", state, backend.max_error, chosen)


def parts(path: Path) -> Iterator[tuple[str, str]]:
    """What a model folder holds, part by part, in words. Raises CheckpointError for a path that is no folder."""
    folder = ModelFolder(path)
    for part, search in _hunyuan(folder) if hunyuan.describes(folder) else _wan(folder):
        yield part, _found(path, part, search)


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
