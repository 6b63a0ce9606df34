"""The networks of one model, read when first needed, and where they wait between their turns."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightx2v.cache.walk import CacheReport
from lightx2v.config import Engine
from lightx2v.decoding import VAEChoice, fitting
from lightx2v.diffuse import Model
from lightx2v.folder import ModelFolder
from lightx2v.identify import CheckpointInfo
from lightx2v.loading import build_transformer, load_transformer
from lightx2v.lora import Applied, Lora, apply_loras, change_loras, check_loras, for_expert, remove_loras
from lightx2v.memory import TEXT_ENCODER_ACTIVATION_BYTES
from lightx2v.models import ImageEncoder, TextEncoder
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.home import Home
from lightx2v.offload.parts import streamable
from lightx2v.offload.placing import Asked, Placing, file_bytes, held_bytes, planned
from lightx2v.offload.plan import GB, RESERVE, DoesNotFitError, Plan, has_room, measure, streamed_bytes
from lightx2v.offload.shortage import Advice, Shortage, caught, free_unused, once_more, says_if_lost
from lightx2v.offload.stream import BlockStream
from lightx2v.parallel.agreement import together
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.shared import share_weights, tightest
from lightx2v.report import sampling_lines
from lightx2v.vae.hunyuan15 import HunyuanVAE
from lightx2v.vae.loading import VAE, FullVAE, VAEInfo, identify_vae, load_vae
from lightx2v.vae.wan import WanVAE
from lightx2v.vae.wan22 import Wan22VAE

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
Result = TypeVar("Result")


class Parts:
    """folder: where encoders and VAE are; None: somebody else has them. infos: of one transformer, or of the high- and
    the low-noise expert."""

    def __init__(self, folder: ModelFolder | None, infos: Sequence[CheckpointInfo], device: torch.device) -> None:
        self.device = device
        self._folder, self._infos = folder or ModelFolder(Path()), tuple(infos)
        self._alone = folder is None
        self._encoders: tuple[Path | None, Path | None] = (None, None)
        self._text: TextEncoder | None = None
        self._image: ImageEncoder | None = None
        self._vaes = VAEChoice()
        self._loaded_vaes: dict[VAEInfo, VAE] = {}
        self._transformers: tuple[nn.Module, ...] = ()
        self._applied: tuple[Applied, ...] = ()
        self._how = "auto"
        self._filed = 0  # blocks of each transformer that were left in its file
        self._placing = Placing(device)
        self._engine = Engine()
        self.plan: Plan | None = None  # of the last request, where one was made
        self.mesh: Mesh | None = None
        self._one_copy = False
        self._shared: tuple[object, ...] = ()  # what is in that copy

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

    def room_bytes(self) -> int | None:
        """The same, within the budget if there is one, and less what a plan keeps in reserve."""
        free, budget = self.free_bytes(), self._engine.vram_budget_gb
        if not budget or not planned(self._engine, self.device):
            return free
        resting = self.plan is not None and not self.plan.whole  # on a CPU these look as if they were on the device
        ours = [*self._loaded_vaes.values(), *(() if resting else self._transformers)]
        held = sum(held_bytes(network) for network in ours if _on(network, self.device))
        left = max(0, int(budget * GB) - RESERVE - held)
        return left if free is None else min(free, left)

    def _full(self) -> VAEInfo:
        space = self._infos[0].spec.latents
        return self._vaes.full or identify_vae(self._folder.vae(space), space)

    def _read_vae(self, info: VAEInfo) -> VAE:
        if info not in self._loaded_vaes:
            self._loaded_vaes[info] = load_vae(info, dtype=self._vae_dtype, device=self.device)
        return self._loaded_vaes[info].to(self.device)

    def rest_vaes(self) -> None:
        """Take every VAE to main memory, until it is asked for."""
        for vae in self._loaded_vaes.values():
            vae.to(CPU)

    def visit(self, network: nn.Module, compute: Callable[[], Result]) -> Result:
        """What `compute` returns with an encoder on the device; it is on the CPU before and after.

        Where a plan decides, what waits on the device makes way for it. One that has no room even then passes through
        block by block; one for which memory is too small even so, or runs out, computes on the CPU.
        """
        if self._engine.vae_offload:
            self.rest_vaes()
        for how in self._visits(network):
            with_network = partial(how, network, compute)
            made = caught(with_network)
            if not isinstance(made, Shortage):
                return made
            self._make_room()
            free_unused()
        log.warning("an encoder of %.1f GB does not fit the GPU: it runs on the CPU", held_bytes(network) / 1e9)
        return compute()

    def _visits(self, network: nn.Module) -> Sequence[Callable[[nn.Module, Callable[[], Result]], Result]]:
        """The ways in which a network may compute on the device, best first."""
        if not planned(self._engine, self.device):
            return [self._whole]
        whole, least = _visiting(network)
        ways = [self._whole] if self._room_for(whole) else []
        return [*ways, self._streamed] if least < whole and self._room_for(least) else ways

    def _whole(self, network: nn.Module, compute: Callable[[], Result]) -> Result:
        if not streamable(network):
            try:
                network.to(self.device)
                return compute()
            finally:
                network.to(CPU)
        home = Home(network)  # so that leaving copies nothing
        try:
            home.copy_to(self.device)
            return compute()
        finally:
            home.leave()

    def _streamed(self, network: nn.Module, compute: Callable[[], Result]) -> Result:
        log.info("memory: an encoder of %.1f GB passes through the GPU block by block", held_bytes(network) / 1e9)
        stream = BlockStream({"": network}, self.device, pin_limit=0)  # pinning takes longer than the one or two passes
        with stream.open(0), stream.hooked():
            return compute()

    def _room_for(self, nbytes: int) -> bool:
        free, budget = self.free_bytes(), self._engine.vram_budget_gb
        if has_room(nbytes, sys.maxsize if free is None else free, budget):
            return True
        self._make_room()
        free = self.free_bytes()
        return has_room(nbytes, sys.maxsize if free is None else free, budget)

    def said(self, caches: Sequence[CacheReport]) -> list[str]:
        """Of the last pass of the sampler: files, kernels, types, memory, LoRAs and those caches."""
        return sampling_lines(self._infos, self._engine, self.device, self.plan, self._applied, caches)

    def use_mesh(self, mesh: Mesh | None, one_copy: bool = False) -> None:
        """Of several processes, from now on; transformers that were read for another are forgotten.

        one_copy: all of them are on this machine, and weights that wait in RAM are there once for all.
        """
        if mesh is not self.mesh or one_copy != self._one_copy:
            self.forget_transformers()
        self.mesh, self._one_copy = mesh, one_copy

    def use_engine(self, engine: Engine) -> None:
        """From now on; transformers that were read for another are forgotten."""
        if engine != self._engine:
            self.forget_transformers()
        self._engine = engine

    def forget_transformers(self) -> None:
        """They are read again at their next use."""
        self._transformers, self._applied, self._shared = (), (), ()
        self._placing.forget()

    @contextmanager
    def model(self, engine: Engine, loras: Sequence[Lora], how: str, asked: Asked | None = None) -> Iterator[Model]:
        """The transformers with their LoRAs, for one pass of the sampler.

        asked: needed where a plan decides ("block", and on a GPU "auto").
        Where no plan decides, one transformer stays on the device unless it is offloaded, and of two the one whose turn
        it is not waits in RAM; on a GPU nothing is then kept from step to step. Raises DoesNotFitError where the plan
        finds no way.
        """
        if engine.vae_offload:
            self.rest_vaes()
        self.use_engine(engine)
        plan = self.plan = self._agreed(engine, asked) if planned(engine, self.device) else None
        resident = len(self._infos) == 1 and engine.offload in ("none", "auto") if plan is None else plan.whole
        wait = self.device if resident else CPU
        if self.mesh is not None and self._one_copy and wait.type == "cpu":
            self._share(self.mesh, engine, tuple(loras), how, plan)
        else:
            if self._shared:
                self.forget_transformers()
            self._ready(engine, loras, how, wait, plan)
        keeps = bool(plan.kept) if plan is not None else self.device.type == "cpu"
        paired = plan is not None and plan.paired
        made = partial(Model, self._infos[0].spec, self.device, mesh=self.mesh, keeps=keeps, paired=paired)
        if plan is not None:
            placed = self._placing.placed(self._transformers, self._applied, plan, self._infos)
            with placed as (networks, around):
                yield made(*networks, around=around)
            return
        if resident:
            (transformer,) = self._transformers
            yield made(lambda: transformer.to(self.device))
            return
        homes = [Home(transformer) for transformer in self._transformers]
        here: list[Home] = []
        try:
            yield made(*map(partial(self._bringer, homes, here), range(len(homes))))
        finally:
            for home in homes:
                home.leave()

    def _agreed(self, engine: Engine, asked: Asked | None) -> Plan:
        """The plan of this process, or the one for all that have one copy of the weights."""
        if self.mesh is None or not self._one_copy:
            return self._planned(engine, asked)
        return tightest(self.mesh, lambda: self._planned(engine, asked))

    def _share(self, mesh: Mesh, engine: Engine, loras: tuple[Lora, ...], how: str, plan: Plan | None) -> None:
        """Transformers with LoRAs, over weights that rank 0 reads for all. Other LoRAs are another copy."""
        filed = 0 if plan is None else self._filed if self._shared and plan.suits(self._filed) else plan.filed
        wanted = (engine, loras, how, filed)
        if wanted == self._shared:
            return
        self.forget_transformers()

        def read() -> tuple[nn.Module, ...]:
            self._ready(engine, loras, how, CPU, plan)
            return self._transformers

        def build() -> tuple[nn.Module, ...]:
            return tuple(build_transformer(info, engine, self.device, mesh) for info in self._infos)

        self._transformers = share_weights(mesh, [info.header for info in self._infos], read, build)
        self._shared, self._filed = wanted, filed

    def _ready(self, engine: Engine, loras: Sequence[Lora], how: str, wait: torch.device, plan: Plan | None) -> None:
        self._load(engine, wait, plan)
        self._set_loras(loras, "branch" if self._filed else how)  # what is read again each time cannot be changed

    def _load(self, engine: Engine, wait: torch.device, plan: Plan | None) -> None:
        if self._filed if plan is None else not plan.suits(self._filed):
            self.forget_transformers()
        if not self._transformers:
            self._filed = 0 if plan is None else plan.filed
            left = partial(left_in_file, count=self._filed, resident=0 if plan is None else plan.resident)
            each = (load_transformer(info, engine, self.device, wait, left, self.mesh) for info in self._infos)
            self._transformers = tuple(each)

    @says_if_lost
    def sampled(
        self, engine: Engine, loras: Sequence[Lora], how: str, asked: Asked, work: Callable[[Model], Tensor]
    ) -> Tensor:
        """What `work` makes with the model; where GPU memory runs out, once more from the start, tighter planned.

        Of several processes none tries again, for the others would not know. All begin to work at the same time.
        Raises DoesNotFitError where memory runs out twice, which says what would fit, and as `model` does.
        """

        def attempt(failed: Plan | None) -> Tensor:
            with self.model(engine, loras, how, replace(asked, failed=failed)) as model:
                return work(model)

        if self.mesh is not None:
            return self._sampled_together(engine, loras, how, asked, work)
        return once_more(attempt, lambda: self.plan, self._make_room, Advice(self._infos[0].spec, asked.shape))

    def _sampled_together(
        self, engine: Engine, loras: Sequence[Lora], how: str, asked: Asked, work: Callable[[Model], Tensor]
    ) -> Tensor:
        mesh = self.mesh
        assert mesh is not None

        def attempt() -> Tensor:
            models: list[Model] = []
            with ExitStack() as stack:
                # Reading takes longer here than there, and may fail here alone.
                together(mesh, lambda: models.append(stack.enter_context(self.model(engine, loras, how, asked))))
                return work(models[0])

        made = caught(attempt)
        if isinstance(made, Shortage):
            raise DoesNotFitError(
                f"GPU memory ran out on process {mesh.rank} of {mesh.size} ({made.said}): lower vram_budget_gb, choose "
                "offload block, or start more processes"
            )
        return made

    def _make_room(self) -> None:
        """Take everything off the device that can wait in main memory."""
        self.clear_transformers()
        self.rest_vaes()

    def clear_transformers(self) -> None:
        """Take the transformers to main memory, until they are asked for."""
        for network in self._transformers if not self._filed else ():  # those in files are nowhere else anyway
            network.to(CPU)

    def _planned(self, engine: Engine, asked: Asked | None) -> Plan:
        if asked is None:
            raise ValueError(f"offload={engine.offload!r} is planned from the size of the video, which was not given")
        there = [vae for vae in self._loaded_vaes.values() if _on(vae, self.device)]
        asked = replace(asked, free=self.free_bytes(), vae=sum(held_bytes(vae) for vae in there))
        text, image = (None if each is None else _visiting(each.model) for each in (self._text, self._image))
        asked = replace(asked, text_encoder=text, image_encoder=image)
        plan = self._placing.plan(engine, self._infos, self._transformers, asked)
        plan = replace(plan, tile=self._tile(plan, asked))
        log.info(plan.line())
        if plan.vae == "visits":
            self.rest_vaes()
        return plan

    def _tile(self, plan: Plan, asked: Asked) -> int:
        """In which tiles the VAE will have to decode what is sampled."""
        if self._alone:
            return 0
        info = self._vaes.tiny or self._full()
        tiling = fitting(info, asked.shape, self._vae_dtype, plan.beside_weights - file_bytes(info.path))
        return tiling.size if tiling is not None else 0

    @property
    def _vae_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def _bringer(self, homes: Sequence[Home], here: list[Home], index: int) -> Callable[[], nn.Module]:
        def bring() -> nn.Module:
            if here != [homes[index]]:
                for home in homes:
                    home.leave()
                homes[index].copy_to(self.device)
                here[:] = [homes[index]]
            return self._transformers[index]

        return bring

    def check_loras(self, loras: Sequence[Lora]) -> None:
        """Raise CheckpointError or ValueError for LoRAs that are missing, damaged or for another model or expert."""
        for info, stack in zip(self._infos, self._stacks(loras), strict=True):
            check_loras(stack, info)

    def _stacks(self, loras: Sequence[Lora]) -> list[tuple[Lora, ...]]:
        names: tuple[str | None, ...] = {0: (), 1: (None,), 2: ("high", "low")}[len(self._infos)]
        return [for_expert(loras, name) for name in names]

    def _set_loras(self, loras: Sequence[Lora], how: str) -> None:
        try:
            self._change_loras(self._stacks(loras), how)
        except BaseException:  # of two experts one may have its LoRAs, or one may lack what it had before
            self.forget_transformers()
            raise

    def _change_loras(self, stacks: Sequence[tuple[Lora, ...]], how: str) -> None:
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


def _visiting(network: nn.Module) -> tuple[int, int]:
    """Bytes that an encoder takes on a device, as a whole and block by block, with what it computes with."""
    beside = TEXT_ENCODER_ACTIVATION_BYTES  # more than what other encoders compute with
    whole = held_bytes(network)
    return whole + beside, (streamed_bytes((measure(network),), 0, 1) if streamable(network) else whole) + beside


def _on(network: nn.Module, device: torch.device) -> bool:
    return next(network.parameters()).device.type == device.type
