"""Parallel: several GPUs for one video, as worker processes that ComfyUI can ask for memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from lightx2v.config import EXCHANGES, Engine, Parallel
from lightx2v.diffuse import Hooks
from lightx2v.lora import Lora
from lightx2v.parallel.devices import ALL, USES, Shared, devices_of, share
from lightx2v.parallel.gain import Gain, facts, remember, remembered
from lightx2v.parallel.jobs import Done, Job
from lightx2v.parallel.workers import Workers

from . import host
from .load import LoadedTransformer

MOST = 64  # processes along one axis


class Ranks(host.EngineHandle):
    """Worker processes in the host's books. They start with the first video and end with the node's output.

    The books say what a process holds on the host's own GPU; the other GPUs are none of the host's business.
    """

    def __init__(self, shared: Shared) -> None:
        device = mm.get_torch_device()
        super().__init__(host.Housed(nn.Module()), device, torch.device("cpu"))
        self.shared = shared
        devices = devices_of(shared.devices, host.gpus())
        if len(devices) == 1 and shared.devices.strip().lower() != ALL:
            raise ValueError(
                f"devices={shared.devices!r} is one device; name two or more, or leave this node out. ComfyUI chooses "
                "its one GPU with --cuda-device"
            )
        self.workers = Workers(devices)
        self._gains: dict[str, Gain] = {}
        self._model: tuple[Path, ...] = ()  # what they hold

    def layout(self, experts: Sequence[LoadedTransformer], guided: bool) -> Parallel:
        """How they share a video of that model; raises ValueError where they cannot."""
        return share(self.shared, len(self.workers.devices), experts[0].info.config.num_heads, guided)

    def partially_load(self, *args: Any, **kwargs: Any) -> int:
        gained = self.model_size() - self.loaded_size()
        self.tell_host(self.model_size())
        self.model.device = self.load_device
        return gained

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:
            self.workers.rest()
            self.model.device = self.offload_device
            self.tell_host(0)
        return self.model

    def worth(self, experts: Sequence[LoadedTransformer], job: Job) -> tuple[bool, list[str]]:
        """Whether they are to do a job, and a line for the report where that was measured."""
        count = len(self.workers.devices)
        if self.shared.use == "always" or count == 1:
            return count > 1, []
        known = facts(job, self.workers.devices)
        key = repr(known)
        gain = self._gains.get(key) or remembered(known)
        if gain is None:
            host.log.info("parallel: measuring a few blocks on one device and on %d", count)
            self._make_room(experts, job)
            with self._booked():
                gain = self.workers.measure(job, Hooks(on_block=host.cancel_point))
            if gain is None:
                return True, []
            remember(known, gain)
        self._gains[key] = gain
        line = f"parallel: {gain.line(count)}"
        host.log.info(line)
        if not gain.worth:
            self.workers.close()
            self.detach()
        return gain.worth, [line]

    @contextmanager
    def _booked(self) -> Iterator[None]:
        """Where the processes are lost within, they hold nothing any longer."""
        try:
            yield
        finally:
            if not self.workers.pids():
                self.detach()

    @property
    def _here(self) -> int | None:
        """The rank on the host's own device, if there is one."""
        own, devices = str(self.load_device), self.workers.devices
        return devices.index(own) if own in devices else None

    def _make_room(self, experts: Sequence[LoadedTransformer], job: Job) -> None:
        for expert in experts:
            expert.leave()
        if job.transformers != self._model:
            self.detach()
            self.size = 1 if self._here is None else sum(expert.info.header.nbytes for expert in experts)
            self._model = job.transformers
        host.on_gpu(self, 0 if self._here is None else experts[0].activation_bytes(job.start.latents))
        mm.soft_empty_cache()  # what this process keeps for later, the ranks cannot have

    def sampled(self, experts: Sequence[LoadedTransformer], job: Job, hooks: Hooks) -> tuple[Tensor, list[str]]:
        """Raw latents, and lines for the report."""
        self._make_room(experts, job)
        with self._booked():
            ranks = self.workers.run(job, hooks)
        if self._here is not None and (held := ranks[self._here].held) is not None:
            self.size = max(1, held)
            self.tell_host(self.size)
        assert ranks[0].latents is not None
        return ranks[0].latents, [_said(self.workers.devices, ranks), *ranks[0].lines]


def _said(devices: Sequence[str], ranks: Sequence[Done]) -> str:
    peaks = [f"{rank.peak / 1e9:.1f}" for rank in ranks if rank.peak is not None]
    memory = f"; at most {', '.join(peaks)} GB of memory" if peaks else ""
    return f"processes: {len(devices)}, on {', '.join(devices)}{memory}"


def engine_of(experts: Sequence[LoadedTransformer], engine: Engine, layout: Parallel) -> Engine:
    """How each rank runs the model: as the loader and the sampler ask, and as ComfyUI was started."""
    offload = engine.offload
    if offload == "auto" and not engine.vram_budget_gb:
        offload = "block" if host.asks_for_little() else "none" if host.keeps_on_gpu() else "auto"
    asked = {"attention": engine.attention, "offload": offload, "vram_budget_gb": engine.vram_budget_gb}
    return replace(experts[0].engine, parallel=layout, **asked)  # type: ignore[arg-type]


def loras_of(experts: Sequence[LoadedTransformer]) -> tuple[Lora, ...]:
    """Of one model or a pair, as one stack."""
    if len(experts) == 1:
        return tuple(replace(lora, expert="both") for lora in experts[0].loras)
    return (*experts[0].loras, *(lora for lora in experts[1].loras if lora.expert != "both"))


ParallelOptions = io.Custom("LIGHTX2V_PARALLEL")  # Ranks


class LightX2VParallel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VParallel",
            display_name="Parallel (LightX2V)",
            category="LightX2V/sampling",
            description="Several GPUs for one video: a process on each, which all hold the model and share the work.",
            inputs=[
                io.String.Input(
                    "devices",
                    default=ALL,
                    tooltip="all, or numbers of GPUs, 0 being the first: 0, 1. Without a GPU all is 2 processes on the "
                    "CPU, to try it; so is cpu, cpu. Each GPU holds the whole model (28.6 GB for Wan 14B in bf16).",
                ),
                io.Combo.Input(
                    "use",
                    options=list(USES),
                    default=USES[0],
                    tooltip="auto: measures a few blocks once for each model and size, and takes 1 GPU where several "
                    "are less than 1.15 times as fast. always: takes them unmeasured.",
                ),
                *cls._sizes(),
                host.advanced(
                    io.Combo.Input(
                        "exchange",
                        options=list(EXCHANGES),
                        default=EXCHANGES[0],
                        optional=True,
                        tooltip="How GPUs send each other queries, keys and values. exact: as they are. fp8: in 8 "
                        "bits, half the bytes of bf16; for GPUs without NVLink.",
                    )
                ),
            ],
            outputs=[ParallelOptions.Output("options", display_name="parallel options")],
        )

    @staticmethod
    def _sizes() -> list[io.Input]:
        words = {
            "ulysses": "GPUs that exchange attention heads for tokens; must divide the heads: Wan 14B has 40 (2, 4, 5, "
            "8), Wan 1.3B 12 (2, 3, 4, 6), HunyuanVideo-1.5 16 (2, 4, 8). 0: as many as fit.",
            "ring": "GPUs that pass keys and values around, any number of them; slower than ulysses where that fits. "
            "0: what ulysses leaves over.",
            "cfg": "2: guidance's 2 passes at the same time, on one half of the GPUs each, with cfg above 1. 1: one "
            "after the other. 0: 2 where there are 2 passes and an even number of GPUs.",
        }
        return [
            host.advanced(io.Int.Input(name, default=0, min=0, max=most, optional=True, tooltip=words[name]))
            for name, most in (("ulysses", MOST), ("ring", MOST), ("cfg", 2))
        ]

    @classmethod
    def execute(
        cls, devices: str, use: str, ulysses: int = 0, ring: int = 0, cfg: int = 0, exchange: str = EXCHANGES[0]
    ) -> io.NodeOutput:
        return io.NodeOutput(Ranks(Shared(devices, ulysses, ring, cfg, exchange, use)))
