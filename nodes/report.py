"""What ran, as text on a node. It travels with the latent: nothing is kept between nodes."""

from typing import Any

from comfy_api.latest import io, ui

from lightx2v.report import Report

from . import host

KEY = "lightx2v"  # of a LATENT; other nodes pass on, or leave out, what they do not know
NOTHING = (
    "Nothing ran yet: this latent comes from no sampler of LightX2V. Connect Sampler (LightX2V), or its latent after "
)
NOTHING += "Decode (LightX2V)."


def so_far(latent: dict[str, Any]) -> Report:
    """What made a latent, as far as this pack's nodes did."""
    found = latent.get(KEY)
    return found if isinstance(found, Report) else Report()


class LightX2VReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VReport",
            display_name="Report (LightX2V)",
            category="LightX2V/sampling",
            description="Says what ran: files, kernels, number types, where weights were, LoRAs and caches, and the "
            "time and memory of each stage.",
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="From Sampler (LightX2V), or the 2nd output of Decode (LightX2V), which adds how frames "
                    "were made (1 line and its seconds).",
                ),
            ],
            outputs=[io.String.Output("text", display_name="text")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent: dict[str, Any]) -> io.NodeOutput:
        report = so_far(latent)
        text = report.text() if report.stages else NOTHING
        host.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
