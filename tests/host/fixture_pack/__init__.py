"""Nodes that only the tests use: they put known values into a graph, and carry exact values out of it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from .carry import FixtureKeep, FixtureRandomLatent, FixtureWanConditioning
from .decoding import FixtureCrampedVae, FixturePreviewMethod
from .memory import FixtureFailingEncoder, FixtureFailingModel, FixtureFreeRam, FixtureHoldMemory, FixtureLoadedModels
from .text import FixtureUmt5Clip
from .vision import FixtureClipVision, FixturePicture, FixtureTightVae, FixtureVae48


class FixtureExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [
            FixtureClipVision,
            FixtureCrampedVae,
            FixtureFailingEncoder,
            FixtureFailingModel,
            FixtureFreeRam,
            FixtureHoldMemory,
            FixtureKeep,
            FixtureLoadedModels,
            FixturePicture,
            FixturePreviewMethod,
            FixtureRandomLatent,
            FixtureTightVae,
            FixtureUmt5Clip,
            FixtureVae48,
            FixtureWanConditioning,
        ]


async def comfy_entrypoint() -> FixtureExtension:
    return FixtureExtension()
