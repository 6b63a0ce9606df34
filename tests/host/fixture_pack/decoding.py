"""VAEs for which there is too little memory, and previews as the user wants them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import comfy.cli_args
import comfy.sd
import torch
from comfy_api.latest import io


class FixtureCrampedVae(io.ComfyNode):
    """The same VAE, which says that it needs more memory than there is, or really has none for more than `columns`
    cells of latents at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixtureCrampedVae",
            category="tests",
            not_idempotent=True,
            inputs=[io.Vae.Input("vae_in"), io.Boolean.Input("says"), io.Int.Input("columns", default=10**6, min=1)],
            outputs=[io.Vae.Output("vae")],
        )

    @classmethod
    def execute(cls, vae_in: comfy.sd.VAE, says: bool, columns: int) -> io.NodeOutput:
        vae = copy.copy(vae_in)
        if says:
            vae.memory_used_decode = lambda shape, dtype: 10**15
        vae.first_stage_model = copy.copy(vae_in.first_stage_model)
        vae.first_stage_model.decode = _within(columns, vae_in.first_stage_model.decode)
        return io.NodeOutput(vae)


def _within(columns: int, decode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def cramped(latents: torch.Tensor, **options: object) -> torch.Tensor:
        if latents.shape[-1] > columns:
            raise torch.OutOfMemoryError("the fixture's")
        return decode(latents, **options)

    return cramped


class FixturePreviewMethod(io.ComfyNode):
    """Passes a LATENT on; from then on previews are made as ComfyUI's --preview-method says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FixturePreviewMethod",
            category="tests",
            not_idempotent=True,
            inputs=[
                io.Latent.Input("latent_in"),
                io.String.Input("method"),
                io.Int.Input("run", tooltip="Never cached"),
            ],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def execute(cls, latent_in: dict, method: str, run: int) -> io.NodeOutput:
        comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod(method)
        return io.NodeOutput(latent_in)
