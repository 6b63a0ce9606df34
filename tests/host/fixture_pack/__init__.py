"""Nodes that only the tests use: they put known values into a graph, and carry exact values out of it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from .carry import FixtureKeep, FixtureRandomLatent, FixtureWanConditioning
from .decoding import FixtureCrampedVae, FixturePreviewMethod
from .faults import FixtureDigest, FixtureTripwire
from .flags import FixturePlanWith
from .hunyuan import FixtureHunyuanClip
from .memory import (
    FixtureFailingEncoder,
    FixtureFailingModel,
    FixtureFreeRam,
    FixtureHoldMemory,
    FixtureKeptFree,
    FixtureLoadedModels,
)
from .text import FixtureUmt5Clip
from .vision import FixtureCellVae, FixtureClipVision, FixturePicture, FixtureTightVae


class FixtureExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [
            FixtureClipVision,
            FixtureCrampedVae,
            FixtureDigest,
            FixtureFailingEncoder,
            FixtureFailingModel,
            FixtureFreeRam,
            FixtureHoldMemory,
            FixtureHunyuanClip,
            FixtureKeep,
            FixtureKeptFree,
            FixtureLoadedModels,
            FixturePicture,
            FixturePlanWith,
            FixturePreviewMethod,
            FixtureRandomLatent,
            FixtureTightVae,
            FixtureTripwire,
            FixtureUmt5Clip,
            FixtureCellVae,
            FixtureWanConditioning,
        ]


async def comfy_entrypoint() -> FixtureExtension:
    return FixtureExtension()
