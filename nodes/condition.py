"""Prompts and sizes: what a request starts from, in ComfyUI's own CONDITIONING and LATENT."""

from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from lightx2v.config import one_of
from lightx2v.latents import HUNYUAN15, WAN21, WAN22, LatentFormat
from lightx2v.memory import TEXT_ENCODER_ACTIVATION_BYTES
from lightx2v.offload.shortage import Shortage, caught, says_if_lost
from lightx2v.shapes import VideoShape, snap, to_latent

from . import host
from .load import LoadedTextEncoder

FAMILIES: dict[str, LatentFormat] = {"wan2.1": WAN21, "wan2.2_5b": WAN22, "hunyuan1.5": HUNYUAN15}
PATCHES = {HUNYUAN15: (1, 1, 1)}  # of families whose patch is not Wan's
PATCH = (1, 2, 2)


class LightX2VTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VTextEncode",
            display_name="Text Encode (LightX2V)",
            category="LightX2V/conditioning",
            description="Encodes a prompt as the model was trained on it: for Wan 512 rows, zeros after the text; for "
            "HunyuanVideo-1.5 its own tokens, and letters in quotation marks apart. The result also drives ComfyUI's "
            "own samplers.",
            inputs=[
                host.TextEncoder.Input("encoder", tooltip="From Load Text Encoder (LightX2V)."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, up to 511 tokens for Wan (about 350 English words) and 995 for "
                    "HunyuanVideo-1.5; longer text is kept and said. Weights such as (word:1.3) are read literally.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", display_name="conditioning")],
        )

    @classmethod
    @says_if_lost
    def execute(cls, encoder: LoadedTextEncoder, text: str) -> io.NodeOutput:
        device = host.on_gpu(encoder.handle, TEXT_ENCODER_ACTIVATION_BYTES)
        made = caught(lambda: encoder.encoder.condition(text, on_block=host.progress()))
        if isinstance(made, Shortage):
            host.log.warning("Too little GPU memory for the text encoder: it runs on the CPU")
            host.make_room()
            made, device = encoder.encoder.condition(text, on_block=host.progress()), encoder.handle.offload_device
        found = made.to(mm.intermediate_device())
        host.log.debug("encoded %d rows on %s", found.context.shape[1], device)
        extras: dict[str, Any] = {"pooled_output": None}
        if found.glyphs is not None:
            extras["conditioning_byt5small"] = found.glyphs
        return io.NodeOutput([[found.context, extras]])


class LightX2VEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VEmptyLatent",
            display_name="Empty Video Latent (LightX2V)",
            category="LightX2V/latent",
            description="An empty video of a size the model can make: sizes are snapped to the nearest and said.",
            inputs=[
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16; of 32 for wan2.2_5b.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16; of 32 for wan2.2_5b.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=4097,
                    step=4,
                    tooltip="Frames, 4n + 1: 81 frames are 5 seconds at Wan's 16 frames per second, 121 at "
                    "HunyuanVideo-1.5's 24.",
                ),
                io.Combo.Input(
                    "family",
                    options=list(FAMILIES),
                    default="wan2.1",
                    tooltip="Latent space of the model. wan2.1 (also the 14B models of Wan2.2): 16 channels, 8 times "
                    "fewer pixels a side. wan2.2_5b (TI2V-5B): 48 channels, 16 times fewer. hunyuan1.5: 32 channels, "
                    "16 times fewer.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once, usually 1."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent")],
        )

    @classmethod
    def execute(cls, width: int, height: int, length: int, family: str, batch_size: int) -> io.NodeOutput:
        one_of("family", family, FAMILIES)
        space = FAMILIES[family]
        video, note = snap(VideoShape(length, height, width), space, PATCHES.get(space, PATCH))
        if note:
            host.log.warning(note)
        shape = (batch_size, space.channels, *to_latent(video, space.stride))
        samples = torch.zeros(shape, device=mm.intermediate_device())
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": space.stride[1]})
