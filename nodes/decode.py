"""Latents to frames."""

from typing import Any

import comfy.sd
from comfy_api.latest import io

from . import host


class LightX2VDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VDecode",
            display_name="Decode (LightX2V)",
            category="LightX2V/latent",
            description="Turns a video latent into frames, one latent frame at a time, with progress and cancel.",
            inputs=[
                io.Latent.Input("latent", tooltip="From a sampler; 81 frames of 832x480 are 21 latent frames."),
                io.Vae.Input("vae", tooltip="From Load VAE (LightX2V), or ComfyUI's own Load VAE."),
            ],
            outputs=[io.Image.Output("frames", display_name="frames")],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], vae: comfy.sd.VAE) -> io.NodeOutput:
        host.cancel_point()
        frames = vae.decode(latent["samples"])
        return io.NodeOutput(frames.flatten(0, 1) if frames.ndim == 5 else frames)
