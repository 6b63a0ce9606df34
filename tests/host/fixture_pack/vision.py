"""Pictures, an image encoder and a VAE as ComfyUI's own objects, in sizes that its loaders do not make."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

HEAD_DIM = 80  # of ViT-H/14
SIGLIP_HEAD_DIM = 72


class FixturePicture(io.ComfyNode):
    """IMAGE of random numbers, the same for the same seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sizes = (("frames", 1), ("height", 90), ("width", 160))
        return io.Schema(
            node_id="FixturePicture",
            category="tests",
            inputs=[
                io.Int.Input("seed", default=0),
                *(io.Int.Input(name, default=size, min=1) for name, size in sizes),
            ],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, seed: int, frames: int, height: int, width: int) -> io.NodeOutput:
        return io.NodeOutput(torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed)))


class FixtureClipVision(io.ComfyNode):
    """Load a file of models/clip_vision in transformers' names, of any width, as ComfyUI's own CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureClipVision",
            category="tests",
            inputs=[io.String.Input("file")],
            outputs=[io.ClipVision.Output("clip_vision")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("clip_vision", file), safe_load=True)
        patch = weights["vision_model.embeddings.patch_embedding.weight"].shape
        tokens, hidden = weights["vision_model.embeddings.position_embedding.weight"].shape
        siglip = "vision_model.head.probe" in weights
        config = {
            "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
            "hidden_act": "gelu_pytorch_tanh" if siglip else "gelu",
            "num_channels": 3,
            "hidden_size": hidden,
            "num_attention_heads": hidden // (SIGLIP_HEAD_DIM if siglip else HEAD_DIM),
            "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": len({m[1] for name in weights if (m := re.search(r"\.layers\.(\d+)\.", name))}),
            "patch_size": patch[2],
            "image_size": round((tokens - (not siglip)) ** 0.5) * patch[2],
        }
        if siglip:
            config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        else:
            config["projection_dim"] = weights["visual_projection.weight"].shape[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            model = comfy.clip_vision.ClipVisionModel(str(path))
        missing, _ = model.load_sd(weights)
        if missing:
            raise ValueError(f"{file}: lacks {missing}")
        return io.NodeOutput(model)


class CellVae:
    """What nodes ask of the VAEs of TI2V-5B (48 channels) and HunyuanVideo-1.5 (32), whose real networks are too large
    for tests: cells of 16x16 pixels, first frame alone and then 4 by 4, each told by that many fixed sums."""

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels

    def spacial_compression_encode(self) -> int:
        return 16

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(F, H, W, 3) -> (1, C, T, H/16, W/16)"""
        x = pixels[..., :3].movedim(-1, 0)[None].float()
        whole = (x.shape[2] - 1) // 4 * 4 + 1
        frames = torch.cat([x[:, :, :1], x[:, :, 1:whole].unflatten(2, (-1, 4)).mean(3)], 2)
        sums = torch.randn(self.latent_channels, 3, 1, 16, 16, generator=torch.Generator().manual_seed(1)) / 16
        return torch.nn.functional.conv3d(frames * 2 - 1, sums, stride=(1, 16, 16))


class FixtureCellVae(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        channels = io.Int.Input("channels", default=48, optional=True)
        return io.Schema(node_id="FixtureCellVae", category="tests", inputs=[channels], outputs=[io.Vae.Output("vae")])

    @classmethod
    def execute(cls, channels: int = 48) -> io.NodeOutput:
        return io.NodeOutput(CellVae(channels))


class FixtureTightVae(io.ComfyNode):
    """The same VAE of this pack, whose network finds no memory the first time that it is asked to encode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureTightVae",
            category="tests",
            not_idempotent=True,
            inputs=[io.Vae.Input("vae_in")],
            outputs=[io.Vae.Output("vae")],
        )

    @classmethod
    def execute(cls, vae_in: comfy.sd.VAE) -> io.NodeOutput:
        network = vae_in.first_stage_model.network
        prepare = network.prepare

        def once(frames: torch.Tensor) -> torch.Tensor:
            network.prepare = prepare
            raise torch.OutOfMemoryError("the fixture's")

        network.prepare = once
        return io.NodeOutput(vae_in)
