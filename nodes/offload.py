"""How transformers get to the GPU for the sampler: as wholes, which ComfyUI moves, or block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management as mm
from torch import Tensor, nn

from lightx2v.cache.choice import kept_bytes
from lightx2v.cache.walk import CacheReport
from lightx2v.config import Engine
from lightx2v.diffuse import Model
from lightx2v.loading import compute_dtype
from lightx2v.offload import Asked, Plan
from lightx2v.offload.shortage import Advice, once_more
from lightx2v.report import sampling_lines

from . import host
from .load import LoadedTransformer

OFFLOADS = ("auto", "model", "block")


def sampled(
    experts: Sequence[LoadedTransformer],
    engine: Engine,
    samples: Tensor,
    cached: bool,
    work: Callable[[Model], Tensor],
    rows: Sequence[int] = (),
) -> tuple[Tensor, Plan | None]:
    """What `work` makes of one handle or two as the engine's model, while it samples latents (B, C, [T,] H, W); and the
    plan, where one was made.

    engine: attention, offload and budget that the sampler asks for. rows: see `Asked`. Where GPU memory runs out,
    `work` runs once more with a tighter plan.
    Raises DoesNotFitError where nothing helps.
    """
    shape = samples.shape if samples.ndim == 5 else samples.unsqueeze(2).shape
    plans: list[Plan | None] = [None]

    def attempt(failed: Plan | None) -> Tensor:
        plans[:] = [_plan(experts, engine, Asked(shape, cached, rows=rows, failed=failed, pin_limit=host.pin_limit()))]
        with _brought(experts, engine, samples, cached, plans[0]) as model:
            return work(model)

    made = once_more(attempt, lambda: plans[0], host.make_room, Advice(experts[0].info.spec, shape))
    return made, plans[0]


def said(
    experts: Sequence[LoadedTransformer], engine: Engine, plan: Plan | None, caches: Sequence[CacheReport]
) -> list[str]:
    """For the report: files, kernels, types, memory, LoRAs and those caches."""
    first = experts[0]
    infos, applied = [expert.info for expert in experts], [expert.applied for expert in experts]
    return sampling_lines(infos, replace(engine, dtype=first.engine.dtype), first.load_device, plan, applied, caches)


@contextmanager
def _brought(
    experts: Sequence[LoadedTransformer], engine: Engine, samples: Tensor, cached: bool, plan: Plan | None
) -> Iterator[Model]:
    """Blocks pass where the plan says so; else ComfyUI moves each transformer as a whole."""
    if plan is not None and plan.ram:
        with _passing(experts, engine.attention, plan) as model:
            yield model
        return
    try:
        yield _whole(experts, engine.attention, samples, cached, plan)
    finally:
        if engine.offload == "model":
            for expert in experts:
                host.back_to_ram(expert)


def _plan(experts: Sequence[LoadedTransformer], engine: Engine, asked: Asked) -> Plan | None:
    """What passes through the GPU; None where that is not asked for."""
    first = experts[0]
    if engine.offload == "auto" and not engine.vram_budget_gb and asked.failed is None:
        if first.load_device.type != "cuda" or host.keeps_on_gpu():
            return None
        engine = replace(engine, offload="block") if host.asks_for_little() else engine
    if engine.offload == "model":
        return None
    asked = replace(asked, free=host.room_if_all_left(experts))
    networks = [expert.model.network for expert in experts]
    plan = first.placing.plan(
        replace(engine, dtype=first.engine.dtype), [expert.info for expert in experts], networks, asked
    )
    host.log.info(plan.line())
    return plan


@contextmanager
def _passing(experts: Sequence[LoadedTransformer], attention: str, plan: Plan) -> Iterator[Model]:
    first = experts[0]
    for expert in experts:
        host.back_to_ram(expert)
    networks = [expert.resting_network(attention, plan) for expert in experts]
    mm.free_memory(plan.peak, first.load_device)
    applied = [expert.applied for expert in experts if expert.applied is not None]
    infos = [expert.info for expert in experts]
    try:
        with first.placing.placed(networks, applied, plan, infos) as (bringers, around):
            first.tell_host(first.placing.device_bytes)
            keeps, paired = bool(plan.kept), plan.paired
            yield Model(first.info.spec, first.load_device, *bringers, around=around, keeps=keeps, paired=paired)
    finally:
        first.tell_host(0)


def _whole(
    experts: Sequence[LoadedTransformer], attention: str, samples: Tensor, cached: bool, plan: Plan | None
) -> Model:
    """Each comes to its device when its turn begins. Without a plan nothing is kept from step to step on a GPU."""
    first, kept = experts[0], 0 if plan is None else plan.kept
    keeps = bool(kept) or first.load_device.type == "cpu"
    here: list[LoadedTransformer] = []

    def network(expert: LoadedTransformer) -> Callable[[], nn.Module]:
        def bring() -> nn.Module:
            if here != [expert]:
                beside = kept + (_kept(expert, samples) if cached else 0)
                host.on_gpu(expert, expert.activation_bytes(samples) + beside)
                here[:] = [expert]
            return expert.network(attention)

        return bring

    low = network(experts[1]) if len(experts) == 2 else None
    return Model(first.info.spec, first.load_device, network(first), low, keeps=keeps)


def _kept(expert: LoadedTransformer, samples: Tensor) -> int:
    shape = samples.shape if samples.ndim == 5 else samples.unsqueeze(2).shape
    return kept_bytes(expert.info, shape, compute_dtype(expert.engine, expert.info.dtype, expert.load_device))
