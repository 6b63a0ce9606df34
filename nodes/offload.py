"""How transformers get to the GPU for the sampler: as wholes, which ComfyUI moves, or block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management as mm
from torch import Tensor, nn

from lightx2v.cache.choice import kept_bytes
from lightx2v.config import Engine
from lightx2v.diffuse import Model
from lightx2v.loading import compute_dtype
from lightx2v.offload import Asked, Plan

from . import host
from .load import LoadedTransformer

OFFLOADS = ("auto", "model", "block")


@contextmanager
def brought(experts: Sequence[LoadedTransformer], engine: Engine, samples: Tensor, cached: bool) -> Iterator[Model]:
    """One handle or two as the engine's model, while it samples latents (B, C, T, H, W) or (B, C, H, W).

    engine: attention, offload and budget that the sampler asks for. Raises DoesNotFitError where nothing helps.
    """
    shape = samples.shape if samples.ndim == 5 else samples.unsqueeze(2).shape
    plan = _plan(experts, engine, Asked(shape, cached))
    if plan is not None:
        with _passing(experts, engine.attention, plan) as model:
            yield model
        return
    try:
        yield _whole(experts, engine.attention, samples, cached)
    finally:
        if engine.offload == "model":
            for expert in experts:
                host.back_to_ram(expert)


def _plan(experts: Sequence[LoadedTransformer], engine: Engine, asked: Asked) -> Plan | None:
    """What passes through the GPU; None where ComfyUI moves each transformer as a whole."""
    first = experts[0]
    if engine.offload == "model" or (
        engine.offload == "auto" and not engine.vram_budget_gb and first.load_device.type != "cuda"
    ):
        return None
    asked = replace(asked, free=host.room_if_all_left(experts))
    networks = [expert.model.network for expert in experts]
    plan = first.placing.plan(
        replace(engine, dtype=first.engine.dtype), [expert.info for expert in experts], networks, asked
    )
    if not plan.streamed and engine.offload == "auto":
        return None
    host.log.info(plan.line())
    return plan if plan.ram else None


@contextmanager
def _passing(experts: Sequence[LoadedTransformer], attention: str, plan: Plan) -> Iterator[Model]:
    first = experts[0]
    for expert in experts:
        host.back_to_ram(expert)
    networks = [expert.resting_network(attention) for expert in experts]
    mm.free_memory(plan.peak, first.load_device)
    applied = [expert.applied for expert in experts if expert.applied is not None]
    try:
        with first.placing.placed(networks, applied, plan) as (bringers, around):
            first.tell_host(first.placing.device_bytes)
            yield Model(first.info.spec, first.load_device, *bringers, around=around)
    finally:
        first.tell_host(0)


def _whole(experts: Sequence[LoadedTransformer], attention: str, samples: Tensor, cached: bool) -> Model:
    """Each comes to its device when its turn begins."""
    here: list[LoadedTransformer] = []

    def network(expert: LoadedTransformer) -> Callable[[], nn.Module]:
        def bring() -> nn.Module:
            if here != [expert]:
                beside = _kept(expert, samples) if cached else 0
                host.on_gpu(expert, expert.activation_bytes(samples) + beside)
                here[:] = [expert]
            return expert.network(attention)

        return bring

    low = network(experts[1]) if len(experts) == 2 else None
    return Model(experts[0].info.spec, experts[0].load_device, network(experts[0]), low)


def _kept(expert: LoadedTransformer, samples: Tensor) -> int:
    shape = samples.shape if samples.ndim == 5 else samples.unsqueeze(2).shape
    return kept_bytes(expert.info, shape, compute_dtype(expert.engine, expert.info.dtype, expert.load_device))
