"""LoRAs: each node adds one to a stack, and a model loader takes the stack."""

from typing import Any

from comfy_api.latest import io

from lightx2v.lora import EXPERTS, Lora, is_lora

from . import host

LoraStack = io.Custom("LIGHTX2V_LORA")  # a tuple of lightx2v.lora.Lora


class LightX2VLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VLoRA",
            display_name="LoRA (LightX2V)",
            category="LightX2V/loaders",
            description="Adds a LoRA to the stack that a model is loaded with. Every dialect of LoRA files is read.",
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=host.files("loras", is_lora),
                    tooltip="LoRA files of models/loras, e.g. "
                    "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors (1.2 GB, rank 64). Whether "
                    "one fits the model is told, with both sizes, when the model is loaded.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Times what the file adds, after the file's own scale (alpha / rank). 1: as it was "
                    "trained; 0: off; most styles look right between 0.6 and 1.2; 4-step LoRAs are made for 1.",
                ),
                io.Combo.Input(
                    "expert",
                    options=list(EXPERTS),
                    default="both",
                    tooltip="For Wan2.2 A14B, whose first steps are one network (high noise) and whose others another "
                    "(low noise): which of the 2 gets this LoRA. Leave 'both' for every other model.",
                ),
                LoraStack.Input(
                    "lora",
                    optional=True,
                    tooltip="The LoRAs so far, from another LoRA (LightX2V). Any number can be chained; what they add "
                    "is summed, so their order does not matter.",
                ),
            ],
            outputs=[LoraStack.Output("stack", display_name="lora")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> tuple[str, int, int]:
        return host.fingerprint("loras", lora_name)

    @classmethod
    def execute(
        cls, lora_name: str, strength: float, expert: str, lora: tuple[Lora, ...] | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput((*(lora or ()), Lora(host.locate("loras", lora_name), strength, expert)))
