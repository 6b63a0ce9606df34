"""What the sampler would plan for a GPU, in a ComfyUI that was started with other flags."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from unittest.mock import patch

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from lightx2v.config import Engine
from lightx2v.offload import Asked, Placing


class FixturePlanWith(io.ComfyNode):
    """The plan, as JSON, for a card of so many MB that nothing is on; null where ComfyUI moves the model.

    flags: of comfy.cli_args, as JSON.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixturePlanWith",
            category="tests",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Custom("LIGHTX2V_MODEL").Input("model"),
                io.String.Input("flags"),
                io.String.Input("offload"),
                io.Int.Input("megabytes"),
            ],
        )

    @classmethod
    def execute(cls, model: object, flags: str, offload: str, megabytes: int) -> io.NodeOutput:
        pack = type(model).__module__.rpartition(".")[0]
        ours, host = (importlib.import_module(f"{pack}.{name}") for name in ("offload", "host"))
        gpu, told = torch.device("cuda"), json.loads(flags)
        placing = Placing(gpu)
        placing._link = 1e10
        reserved = int(told.get("reserve_vram", 0.4) * 2**30)  # as comfy.model_management reads it when it is imported
        with (
            patch.dict(vars(mm.args), told),
            patch.object(mm, "get_free_memory", lambda *_: megabytes * 10**6),
            patch.object(mm, "extra_reserved_memory", lambda: reserved),
            patch.object(model, "load_device", gpu),
            patch.object(model.held, "placing", placing),
        ):
            asked = Asked((1, 16, 5, 12, 16), pin_limit=host.pin_limit())
            plan = ours._plan([model], Engine(offload=offload), asked)
        return io.NodeOutput(ui={"text": (json.dumps(None if plan is None else asdict(plan)),)})
