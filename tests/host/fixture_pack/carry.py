"""Values into a graph, and out of it bit for bit."""

from __future__ import annotations

import uuid
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io


class FixtureKeep(io.ComfyNode):
    """Save whatever arrives (LATENT, CONDITIONING, IMAGE, ...) so that a test can read it back with Result.kept()."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureKeep",
            category="tests",
            is_output_node=True,
            inputs=[io.AnyType.Input("value")],
        )

    @classmethod
    def execute(cls, value: object) -> io.NodeOutput:
        path = Path(folder_paths.get_output_directory()) / "kept" / f"{uuid.uuid4().hex}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(_plain(value), path)
        return io.NodeOutput(ui={"kept": (str(path),)})


def _plain(value: object) -> object:
    """Reduce to what torch.load(weights_only=True) reads; anything it does not know becomes its repr."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "penultimate_hidden_states"):
        return _plain(vars(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


class FixtureWanConditioning(io.ComfyNode):
    """A Wan CONDITIONING of random numbers: (1, tokens, 4096) float32, the same for the same seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureWanConditioning",
            category="tests",
            inputs=[io.Int.Input("seed", default=0), io.Int.Input("tokens", default=512, min=1, max=4096)],
            outputs=[io.Conditioning.Output("conditioning")],
        )

    @classmethod
    def execute(cls, seed: int, tokens: int) -> io.NodeOutput:
        embedding = torch.randn(1, tokens, 4096, generator=torch.Generator().manual_seed(seed)) * 0.1
        return io.NodeOutput([[embedding, {"pooled_output": None}]])


class FixtureRandomLatent(io.ComfyNode):
    """A LATENT of normal numbers, (1, channels, frames, height, width), with a key that must survive every node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sizes = (("channels", 16), ("frames", 5), ("height", 12), ("width", 16))
        return io.Schema(
            node_id="FixtureRandomLatent",
            category="tests",
            inputs=[
                io.Int.Input("seed", default=0),
                *(io.Int.Input(name, default=size, min=1) for name, size in sizes),
            ],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def execute(cls, seed: int, channels: int, frames: int, height: int, width: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        samples = torch.randn(1, channels, frames, height, width, generator=generator)
        return io.NodeOutput({"samples": samples, "fixture_note": "keep me"})
