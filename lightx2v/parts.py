"""The networks of one model, read when first needed, and where they wait between their turns."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lightx2v.config import Engine
from lightx2v.decoding import VAEChoice
from lightx2v.diffuse import Model
from lightx2v.folder import ModelFolder
from lightx2v.identify import CheckpointInfo
from lightx2v.loading import load_transformer
from lightx2v.lora import Applied, Lora, apply_loras, change_loras, check_loras, for_expert, remove_loras
from lightx2v.memory import TEXT_ENCODER_ACTIVATION_BYTES
from lightx2v.models import ImageEncoder, TextEncoder
from lightx2v.offload.placing import Asked, Placing, held_bytes, planned
from lightx2v.offload.plan import Plan, has_room
from lightx2v.vae.hunyuan15 import HunyuanVAE
from lightx2v.vae.loading import VAE, FullVAE, VAEInfo, identify_vae, load_vae
from lightx2v.vae.wan import WanVAE
from lightx2v.vae.wan22 import Wan22VAE

log = logging.getLogger(__name__)
CPU = torch.device("cpu")


class Parts:
    """folder: where encoders and VAE are. infos: of one transformer, or of the high- and the low-noise expert."""

    def __init__(self, folder: ModelFolder, infos: Sequence[CheckpointInfo], device: torch.device) -> None:
        self.device = device
        self._folder, self._infos = folder, tuple(infos)
        self._encoders: tuple[Path | None, Path | None] = (None, None)
        self._text: TextEncoder | None = None
        self._image: ImageEncoder | None = None
        self._vaes = VAEChoice()
        self._loaded_vaes: dict[VAEInfo, VAE] = {}
        self._transformers: tuple[nn.Module, ...] = ()
        self._applied: tuple[Applied, ...] = ()
        self._how = "auto"
        self._placing = Placing(device)
        self._engine = Engine()
        self.plan: Plan | None = None  # of the last request, where one was made

    def text_encoder(self) -> TextEncoder:
        """That of the transformers' family, on the CPU unless it is visiting."""
        if self._text is None:
            self._text = self._infos[0].spec.encoders.text(self._folder, self._encoders[0])
        return self._text

    def image_encoder(self) -> ImageEncoder:
        """The same for pictures."""
        if self._image is None:
            self._image = self._infos[0].spec.encoders.image(self._folder, self._encoders[1])
        return self._image

    def use_encoders(self, text: Path | None, image: Path | None) -> None:
        """Files in place of the folder's, from now on."""
        if (text, image) != self._encoders:
            self._text, self._image = None, None
        self._encoders = (text, image)

    def use_transformers(self, infos: Sequence[CheckpointInfo]) -> None:
        """From now on; those read before are forgotten."""
        self._infos = tuple(infos)
        self.forget_transformers()

    def use_vaes(self, vaes: VAEChoice) -> None:
        """From now on; those read before are forgotten."""
        if vaes != self._vaes:
            self._loaded_vaes = {}
        self._vaes = vaes

    def vae(self) -> FullVAE | HunyuanVAE:
        """The VAE that encodes, on the device."""
        vae = self._read_vae(self._full())
        # A model's folder has no others by that name, and choose_vaes takes none.
        assert isinstance(vae, WanVAE | Wan22VAE | HunyuanVAE)
        return vae

    def decoder(self) -> tuple[VAEInfo, VAE]:
        """The VAE or tiny autoencoder that decodes, on the device."""
        info = self._vaes.tiny or self._full()
        return info, self._read_vae(info)

    def free_bytes(self) -> int | None:
        """On the device, beside what is there; None for a CPU. What PyTorch keeps for itself is free too."""
        if self.device.type != "cuda":
            return None
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept

    def _full(self) -> VAEInfo:
        space = self._infos[0].spec.latents
        return self._vaes.full or identify_vae(self._folder.vae(space), space)

    def _read_vae(self, info: VAEInfo) -> VAE:
        if info not in self._loaded_vaes:
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            self._loaded_vaes[info] = load_vae(info, dtype=dtype, device=self.device)
        return self._loaded_vaes[info].to(self.device)

    def rest_vaes(self) -> None:
        """Take every VAE to main memory, until it is asked for."""
        for vae in self._loaded_vaes.values():
            vae.to(CPU)

    @contextmanager
    def visiting(self, network: nn.Module) -> Iterator[None]:
        """The network is on the device within, and on the CPU after.

        Where a plan decides, what waits on the device makes way for it, and one that has no room even then computes on
        the CPU.
        """
        if self._engine.vae_offload:
            self.rest_vaes()
        needed = held_bytes(network) + TEXT_ENCODER_ACTIVATION_BYTES  # more than what other encoders compute with
        if planned(self._engine, self.device) and not self._room_for(needed):
            log.warning("an encoder of %.1f GB does not fit the GPU: it runs on the CPU", held_bytes(network) / 1e9)
            yield
            return
        network.to(self.device)
        try:
            yield
        finally:
            network.to(CPU)

    def _room_for(self, nbytes: int) -> bool:
        free, budget = self.free_bytes(), self._engine.vram_budget_gb
        if free is None or has_room(nbytes, free, budget):
            return True
        for network in self._transformers:
            network.to(CPU)
        self.rest_vaes()
        return has_room(nbytes, self.free_bytes() or 0, budget)

    def use_engine(self, engine: Engine) -> None:
        """From now on; transformers that were read for another are forgotten."""
        if engine != self._engine:
            self.forget_transformers()
        self._engine = engine

    def forget_transformers(self) -> None:
        """They are read again at their next use."""
        self._transformers, self._applied = (), ()
        self._placing.forget()

    @contextmanager
    def model(self, engine: Engine, loras: Sequence[Lora], how: str, asked: Asked | None = None) -> Iterator[Model]:
        """The transformers with their LoRAs, for one pass of the sampler.

        asked: needed where a plan decides ("block", and on a GPU "auto").
        Where no plan decides, one transformer stays on the device unless it is offloaded, and of two the one whose turn
        it is not waits in RAM. Raises DoesNotFitError where the plan finds no way.
        """
        if engine.vae_offload:
            self.rest_vaes()
        self.use_engine(engine)
        plan = self.plan = self._planned(engine, asked) if planned(engine, self.device) else None
        resident = len(self._infos) == 1 and engine.offload in ("none", "auto") if plan is None else plan.whole
        if not self._transformers:
            wait = self.device if resident else CPU
            self._transformers = tuple(load_transformer(info, engine, self.device, wait) for info in self._infos)
        self._set_loras(loras, how)
        if plan is not None:
            with self._placing.placed(self._transformers, self._applied, plan) as (networks, around):
                yield Model(self._infos[0].spec, self.device, *networks, around=around)
            return
        bringers = [self._bringer(transformer) for transformer in self._transformers]
        try:
            yield Model(self._infos[0].spec, self.device, *bringers)
        finally:
            for transformer in () if resident else self._transformers:
                transformer.to(CPU)

    def _planned(self, engine: Engine, asked: Asked | None) -> Plan:
        if asked is None:
            raise ValueError(f"offload={engine.offload!r} is planned from the size of the video, which was not given")
        there = [vae for vae in self._loaded_vaes.values() if next(vae.parameters()).device.type == self.device.type]
        asked = replace(asked, free=self.free_bytes(), vae=sum(held_bytes(vae) for vae in there))
        plan = self._placing.plan(engine, self._infos, self._transformers, asked)
        log.info(plan.line())
        if plan.vae == "visits":
            self.rest_vaes()
        return plan

    def _bringer(self, transformer: nn.Module) -> Callable[[], nn.Module]:
        def bring() -> nn.Module:
            if next(transformer.parameters()).device.type != self.device.type:
                for other in self._transformers:
                    other.to(CPU)
                transformer.to(self.device)
            return transformer

        return bring

    def check_loras(self, loras: Sequence[Lora]) -> None:
        """Raise CheckpointError or ValueError for LoRAs that are missing, damaged or for another model or expert."""
        for info, stack in zip(self._infos, self._stacks(loras), strict=True):
            check_loras(stack, info)

    def _stacks(self, loras: Sequence[Lora]) -> list[tuple[Lora, ...]]:
        names: tuple[str | None, ...] = {0: (), 1: (None,), 2: ("high", "low")}[len(self._infos)]
        return [for_expert(loras, name) for name in names]

    def _set_loras(self, loras: Sequence[Lora], how: str) -> None:
        stacks = self._stacks(loras)
        if self._applied and (how != self._how or not any(stacks)):
            for module, applied in zip(self._transformers, self._applied, strict=True):
                remove_loras(module, applied)
            self._applied = ()
        if not self._applied and any(stacks):
            each = zip(self._transformers, self._infos, stacks, strict=True)
            self._applied = tuple(
                apply_loras(module, info, stack, how, device=self.device) for module, info, stack in each
            )
            self._how = how
        elif [applied.loras for applied in self._applied] != stacks:
            changing = zip(self._transformers, self._applied, stacks, strict=bool(self._applied))
            self._applied = tuple(
                change_loras(module, applied, stack, device=self.device) for module, applied, stack in changing
            )
