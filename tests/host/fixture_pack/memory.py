"""Other people's models in memory, as seen by ComfyUI's memory management."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from lightx2v.offload import placing


class FixtureHoldMemory(io.ComfyNode):
    """Load a model of so many MB on the compute device and keep it there, as a node of another pack would."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureHoldMemory",
            category="tests",
            not_idempotent=True,
            inputs=[io.Int.Input("megabytes", default=16, min=1), io.AnyType.Input("after", optional=True)],
            outputs=[io.Custom("FIXTURE_MODEL").Output("held")],
        )

    @classmethod
    def execute(cls, megabytes: int, after: object = None) -> io.NodeOutput:
        patcher = comfy.model_patcher.ModelPatcher(
            torch.nn.Linear(1024, megabytes * 256, bias=False),
            comfy.model_management.get_torch_device(),
            comfy.model_management.unet_offload_device(),
        )
        comfy.model_management.load_models_gpu([patcher])
        return io.NodeOutput(patcher)


class FixtureFailingModel(io.ComfyNode):
    """Let GPU memory run out at some calls of a network's last block, counted from 0, as in a list like "0, 3"."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureFailingModel",
            category="tests",
            not_idempotent=True,
            inputs=[io.Custom("LIGHTX2V_MODEL").Input("model"), io.String.Input("calls", default="0")],
            outputs=[io.Custom("LIGHTX2V_MODEL").Output("failing")],
        )

    @classmethod
    def execute(cls, model: object, calls: str) -> io.NodeOutput:
        fails, seen = {int(call) for call in calls.split(",")}, []

        def fail(*_: object) -> None:
            seen.append(1)
            if len(seen) - 1 in fails:
                raise torch.OutOfMemoryError("the test's")
            if len(seen) > max(fails):
                hook.remove()

        hook = model.model.network.blocks[-1].register_forward_pre_hook(fail)
        return io.NodeOutput(model)


class FixtureFailingEncoder(io.ComfyNode):
    """Let GPU memory run out at the first call of a text encoder's first block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureFailingEncoder",
            category="tests",
            not_idempotent=True,
            inputs=[io.Custom("LIGHTX2V_TEXT_ENCODER").Input("encoder")],
            outputs=[io.Custom("LIGHTX2V_TEXT_ENCODER").Output("failing")],
        )

    @classmethod
    def execute(cls, encoder: object) -> io.NodeOutput:
        def fail(*_: object) -> None:
            hook.remove()
            raise torch.OutOfMemoryError("the test's")

        hook = encoder.encoder.model.encoder.block[0].register_forward_pre_hook(fail)
        return io.NodeOutput(encoder)


class FixtureFreeRam(io.ComfyNode):
    """Passes a LATENT on; from then on so many MB of RAM look free, or as many as there are for -1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureFreeRam",
            category="tests",
            not_idempotent=True,
            inputs=[io.Latent.Input("latent_in"), io.Int.Input("megabytes", min=-1)],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def execute(cls, latent_in: dict, megabytes: int) -> io.NodeOutput:
        real = getattr(placing.ram_bytes, "real", placing.ram_bytes)

        def looks() -> tuple[int, int]:
            return megabytes * 10**6, real()[1]

        looks.real = real
        placing.ram_bytes = real if megabytes < 0 else looks
        return io.NodeOutput(latent_in)


class FixtureLoadedModels(io.ComfyNode):
    """List what ComfyUI counts as loaded, one JSON object a model: patcher class, module class, bytes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureLoadedModels",
            category="tests",
            is_output_node=True,
            not_idempotent=True,
            inputs=[io.AnyType.Input("after", optional=True)],
        )

    @classmethod
    def execute(cls, after: object = None) -> io.NodeOutput:
        loaded = [entry.model for entry in comfy.model_management.current_loaded_models if entry.model is not None]
        lines = (
            {"patcher": type(model).__name__, "module": type(model.model).__name__, "bytes": model.loaded_size()}
            for model in loaded
        )
        return io.NodeOutput(ui={"text": tuple(json.dumps(line) for line in lines)})


class FixtureKeptFree(io.ComfyNode):
    """Show how many MB of freed memory the C library has kept and gives back when it is asked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureKeptFree",
            category="tests",
            is_output_node=True,
            not_idempotent=True,
            inputs=[io.AnyType.Input("after")],
        )

    @classmethod
    def execute(cls, after: object) -> io.NodeOutput:
        before = _anonymous()
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
        return io.NodeOutput(ui={"text": (f"{(before - _anonymous()) / 1e6:.1f}",)})


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
