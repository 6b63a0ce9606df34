"""The transformers of one model, placed as a plan says, from one request to the next."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lightx2v.blocks import RunBlocks
from lightx2v.cache.choice import kept_bytes
from lightx2v.checkpoint import Header
from lightx2v.config import Engine, Parallel, one_of
from lightx2v.guidance import Conditioning
from lightx2v.identify import CheckpointInfo
from lightx2v.loading import build_transformer, compute_dtype
from lightx2v.lora import Applied, Lora
from lightx2v.memory import fused_by, text_bytes, transformer_activation_bytes, waiting_bytes
from lightx2v.offload.lane import link_rate
from lightx2v.offload.plan import GB, RAM_RESERVE, DoesNotFitError, Machine, Needs, Plan, measure, plan, tighter
from lightx2v.offload.shortage import Advice
from lightx2v.offload.stream import BlockStream
from lightx2v.parallel.mesh import beside
from lightx2v.quant.packing import filling

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
Networks = Sequence[Callable[[], nn.Module]]
Around = Callable[[RunBlocks, str | None], RunBlocks]
PINNED_SHARE = 0.45 if sys.platform == "win32" else 0.9  # of all RAM; Windows lets a process lock half of it


GRANULARITIES = ("block", "phase", "model", "auto")


def offloaded(engine: Engine, offload: bool, granularity: str) -> Engine:
    """The engine with LightX2V's two settings. "phase" runs as "block", which the log says.

    LightX2V's phases are parts of a block (self-attention, cross-attention, feed-forward), three of them on the GPU,
    which is about one block. "block" holds at most one more, 0.7 GB of Wan 14B in bf16, has a whole block's computing
    to hide each copy behind, and within a budget holds one block alone where two have no room.
    """
    one_of("offload_granularity", granularity, GRANULARITIES)
    if not offload:
        return replace(engine, offload="none")
    if granularity == "phase":
        log.info(
            "offload_granularity='phase' runs as 'block': at most one block more on the GPU, and fewer, longer copies"
        )
        granularity = "block"
    return replace(engine, offload=granularity)


def budgeted(engine: Engine, **budgets: float) -> Engine:
    """The engine with these budgets. Raises ValueError for one that nothing would use."""
    for name, budget in budgets.items():
        if budget > 0 and engine.offload == "none":
            raise ValueError(f"{name}={budget:g} without cpu_offload=True changes nothing; set both")
        if budget > 0 and engine.offload == "model":
            raise ValueError(f"{name}={budget:g} changes nothing for whole models; use offload_granularity 'block'")
    return replace(engine, **budgets)  # type: ignore[arg-type]


def planned(engine: Engine, device: torch.device) -> bool:
    """Whether a plan decides. On a device whose free memory is not known, "auto" keeps everything there."""
    return engine.offload == "block" or (engine.offload == "auto" and device.type == "cuda")


@dataclass(frozen=True)
class Asked:
    """What a request finds, and brings with it that takes memory.

    shape: of its latents, (B, C, T, H, W). free: bytes of the device beside what is there; None: not known.
    vae: bytes of it on the device. text_encoder, image_encoder: as in `Needs`.
    rows: tokens of text and image that each pass of guidance reads, of a sample; one number where there is one pass.
    failed: the plan that memory ran out with, where this is the second try.
    pin_limit: bytes of host memory that may be pinned; None: as much as the system lets a process pin.
    """

    shape: Sequence[int]
    cached: bool = False
    loras: Sequence[Lora] = ()
    rows: Sequence[int] = ()
    free: int | None = None
    vae: int = 0
    text_encoder: tuple[int, int] | None = None
    image_encoder: tuple[int, int] | None = None
    failed: Plan | None = None
    pin_limit: int | None = None


def rows_of(*conds: Conditioning | None) -> tuple[int, ...]:
    """Of each that is there, the tokens that attention reads of a sample beside the video's."""
    every = ((cond.context, cond.clip, cond.glyphs) for cond in conds if cond is not None)
    return tuple(sum(tokens.shape[1] for tokens in each if tokens is not None) for each in every)


class Placing:
    """Keeps the weights of one model's transformers at rest between requests, where they pass through the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: BlockStream | None = None
        self._made_with: tuple[object, ...] = ()
        self._link: float | None = None

    def plan(
        self, engine: Engine, infos: Sequence[CheckpointInfo], networks: Sequence[nn.Module], asked: Asked
    ) -> Plan:
        """networks: those read already, or none. Raises DoesNotFitError where nothing helps."""
        alone = replace(engine, parallel=Parallel())  # weights are the same however many compute
        shown = networks or [build_transformer(info, alone, self.device) for info in infos]
        info = infos[0]
        dtype = compute_dtype(engine, info.dtype, self.device)
        fused, parts = all(fused_by(network) for network in shown), engine.parallel.sequence
        activations = transformer_activation_bytes(info, asked.shape, dtype, parts, fused=fused)
        activations += kept_bytes(info, asked.shape, dtype) if asked.cached else 0
        activations += 0 if networks else sum(file_bytes(lora.path) for lora in asked.loras)
        here = sum(held_bytes(network) for network in networks if _on(network, self.device))
        if self._link is None:
            self._link = link_rate(self.device)
        sharing = beside() if engine.parallel.size > 1 else 1
        ram, total = (nbytes // sharing for nbytes in ram_bytes())
        free_ram = ram + sum(held_bytes(network) for network in networks if _on(network, CPU))
        if engine.ram_budget_gb:
            free_ram = min(free_ram, int(engine.ram_budget_gb * GB) + RAM_RESERVE)
        machine = Machine(
            free_vram=sys.maxsize if asked.free is None else asked.free + asked.vae + here,
            free_ram=free_ram,
            pin_limit=self._pin_limit(total, asked),
            link=self._link,
        )
        sizes = tuple(measure(network) for network in shown)
        rows = max(asked.rows, default=0) if engine.parallel.cfg > 1 else sum(asked.rows)
        kept = text_bytes(info, asked.shape[0], rows, dtype)
        needs = Needs(sizes, activations, asked.text_encoder, asked.image_encoder, asked.vae, kept)
        if len(asked.rows) > 1 and engine.parallel.size == 1:
            needs = replace(needs, waiting=waiting_bytes(info, asked.shape, max(asked.rows), dtype))
        least = engine.offload == "block" and not engine.vram_budget_gb
        try:
            if asked.failed is not None:
                return tighter(needs, machine, asked.failed)
            return plan(needs, machine, budget_gb=engine.vram_budget_gb, least=least, vae_offload=engine.vae_offload)
        except DoesNotFitError as error:
            raise Advice(info.spec, asked.shape).on(error) from None

    def _pin_limit(self, total: int, asked: Asked) -> int:
        if self.device.type != "cuda":
            return 0
        most = int(PINNED_SHARE * total)
        return most if asked.pin_limit is None else min(most, asked.pin_limit)

    @contextmanager
    def placed(
        self,
        networks: Sequence[nn.Module],
        applied: Sequence[Applied],
        plan: Plan,
        infos: Sequence[CheckpointInfo] = (),
    ) -> Iterator[tuple[Networks, Around]]:
        """The transformers for one request, with LoRAs on them as `applied` says.

        infos: where weights are read from that were left in their file.
        """
        if plan.whole:
            self.forget()
            for network in networks:
                network.to(self.device)
            yield [_giver(network) for network in networks], _as_it_is
            return
        headers = [filling(each, info.header, CPU) for each, info in zip(networks, infos, strict=False)]
        stream = self._streaming(networks, applied, plan.pinned, headers)
        names = ("",) if len(networks) == 1 else ("high", "low")
        with stream.open(plan.resident, plan.prefetch):
            yield [_bringer(stream, name) for name in names], stream.around

    @property
    def device_bytes(self) -> int:
        """Held for weights that pass through; 0 between requests."""
        return self._stream.device_bytes if self._stream is not None else 0

    def forget(self) -> None:
        """The weights stay where they rest, but are no longer pinned."""
        if self._stream is not None:
            self._stream.release()
        self._stream, self._made_with = None, ()

    def _streaming(
        self, networks: Sequence[nn.Module], applied: Sequence[Applied], pin_limit: int, headers: Sequence[Header]
    ) -> BlockStream:
        made_with = (*networks, *applied)
        same = len(made_with) == len(self._made_with)
        same = same and all(new is old for new, old in zip(made_with, self._made_with, strict=True))
        if self._stream is None or not same:
            self.forget()  # before the next is pinned
            names = ("",) if len(networks) == 1 else ("high", "low")
            named, files = dict(zip(names, networks, strict=True)), dict(zip(names, headers, strict=False))
            self._stream = BlockStream(named, self.device, pin_limit=pin_limit, headers=files)
            self._made_with = made_with
        return self._stream


def _as_it_is(run: RunBlocks, following: str | None) -> RunBlocks:
    return run


def _giver(network: nn.Module) -> Callable[[], nn.Module]:
    return lambda: network


def _bringer(stream: BlockStream, name: str) -> Callable[[], nn.Module]:
    return lambda: stream.bring(name)


def _on(network: nn.Module, device: torch.device) -> bool:
    return next(network.parameters()).device.type == device.type


def held_bytes(network: nn.Module) -> int:
    """Of all its weights, but those that are in a file."""
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)


def file_bytes(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def ram_bytes() -> tuple[int, int]:
    """(what programs may still take, all) of main memory. Where nothing tells what is free, all of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
        known = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2}
        limit, held = container_bytes(Path("/sys/fs/cgroup"))
        return max(0, min(known["MemAvailable"], limit - held)), min(known["MemTotal"], limit)
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    return _windows_ram()


def container_bytes(folder: Path) -> tuple[int, int]:
    """(limit of a container's memory, what of it is taken and could not be dropped); no limit where there is none.

    folder: of the control group, version 2 (docs.kernel.org, admin-guide/cgroup-v2: memory.max, .current, .stat).
    """
    files = [folder / name for name in ("memory.max", "memory.current", "memory.stat")]
    if not all(file.is_file() for file in files):
        return sys.maxsize, 0
    limit, current, stat = (file.read_text(encoding="ascii") for file in files)
    if limit.strip() == "max":
        return sys.maxsize, 0
    counted = dict(line.split() for line in stat.splitlines())
    cached = sum(int(counted.get(name, 0)) for name in ("active_file", "inactive_file"))
    return int(limit), max(0, int(current) - cached)


def _windows_ram() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "all_page", "page", "all_virtual", "virtual")),
            ("extended", ctypes.c_ulonglong),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.free), int(status.total)
