"""Other people's models in memory, as seen by ComfyUI's memory management."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io


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
