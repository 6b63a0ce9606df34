"""Loaders. Each picker lists only the files that fit it, told from their headers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from lightx2v.config import DTYPES, Engine
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.loading import compute_dtype, load_transformer, with_attention
from lightx2v.memory import transformer_activation_bytes
from lightx2v.text import umt5
from lightx2v.vae import stream
from lightx2v.vae.loading import VAE, VAEInfo, identify_vae, load_vae

from . import host


class LoadedTransformer(host.EngineHandle):
    """A transformer in the host's books, with what its file said about itself."""

    info: CheckpointInfo
    engine: Engine

    def network(self, attention: str) -> nn.Module:
        """The transformer with the attention backend that the sampler asks for; weights are shared, never copied."""
        if attention != self.engine.attention:
            self.engine = Engine(attention=attention, dtype=self.engine.dtype)
            self.model.network = with_attention(self.model.network, self.info, self.engine, self.load_device)
        return self.model.network

    def activation_bytes(self, samples: Tensor) -> int:
        """Beside the weights, for latents (B, C, T, H, W) or a batch of single frames (B, C, H, W)."""
        shape = samples.shape if samples.ndim == 5 else samples.unsqueeze(2).shape
        return transformer_activation_bytes(
            self.info, shape, compute_dtype(self.engine, self.info.dtype, self.load_device)
        )


class LightX2VLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VLoadModel",
            display_name="Load Model (LightX2V)",
            category="LightX2V/loaders",
            description="Loads a video diffusion model. Family, task and storage format are read from the file.",
            inputs=[
                io.Combo.Input(
                    "original_ckpt",
                    options=host.files("diffusion_models", _is_model),
                    tooltip="Files of models/diffusion_models (and extra_model_paths) that this pack can run: "
                    "Wan2.1 text-to-video, 1.3B or 14B, bf16, fp16 or fp32. Of a sharded model pick any shard.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Compute type. auto: the file's half precision on a GPU, fp32 on the CPU. "
                    "Wan 14B is 28.6 GB in bf16 or fp16 and 57.2 GB in fp32.",
                ),
            ],
            outputs=[host.Model.Output("model", display_name="model")],
        )

    @classmethod
    def fingerprint_inputs(cls, original_ckpt: str, **_: Any) -> tuple[str, int, int]:
        return host.fingerprint("diffusion_models", original_ckpt)

    @classmethod
    def execute(cls, original_ckpt: str, dtype: str) -> io.NodeOutput:
        info, engine = identify(host.locate("diffusion_models", original_ckpt)), Engine(dtype=dtype)
        device, resting = mm.get_torch_device(), mm.unet_offload_device()
        handle = LoadedTransformer(host.Housed(load_transformer(info, engine, device, resting)), device, resting)
        handle.info, handle.engine = info, engine
        return io.NodeOutput(handle)


@dataclass(frozen=True)
class LoadedTextEncoder:
    encoder: umt5.UMT5
    handle: host.EngineHandle


class LightX2VLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VLoadTextEncoder",
            display_name="Load Text Encoder (LightX2V)",
            category="LightX2V/loaders",
            description="Loads umT5-xxl, the text encoder of Wan, in Wan's own, transformers' or ComfyUI's layout.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=host.files("text_encoders", _is_text_encoder),
                    tooltip="umT5 files of models/text_encoders, e.g. umt5_xxl_fp16.safetensors (11.4 GB). Without a "
                    "tokenizer inside the file, Wan's google/umt5-xxl folder must lie next to it.",
                ),
            ],
            outputs=[host.TextEncoder.Output("encoder", display_name="text encoder")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str, **_: Any) -> tuple[str, int, int]:
        return host.fingerprint("text_encoders", text_encoder)

    @classmethod
    def execute(cls, text_encoder: str) -> io.NodeOutput:
        device, resting = mm.text_encoder_device(), mm.text_encoder_offload_device()
        encoder = umt5.load(host.locate("text_encoders", text_encoder), tokenizer=None, dtype=None, device=resting)
        return io.NodeOutput(LoadedTextEncoder(encoder, host.EngineHandle(host.Housed(encoder.model), device, resting)))


class LightX2VLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VLoadVAE",
            display_name="Load VAE (LightX2V)",
            category="LightX2V/loaders",
            description="Loads the VAE of Wan2.1 and Wan2.2 A14B, full (127 M parameters) or LightVAE (8 M), or of TI2V-5B "
            "(705 M). Fits ComfyUI's own nodes.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=host.files("vae", _is_vae),
                    tooltip="Files of models/vae: wan_2.1_vae.safetensors (254 MB) for Wan2.1 and Wan2.2 A14B, "
                    "wan2.2_vae.safetensors (1.4 GB) for TI2V-5B.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="VAE")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, **_: Any) -> tuple[str, int, int]:
        return host.fingerprint("vae", vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(EngineVAE(host.locate("vae", vae_name)))


class EngineVAE(comfy.sd.VAE):
    """ComfyUI's VAE object with our network inside, so that every native node takes it.

    The host's constructor runs first, on the tensor names and shapes of the family's published VAE and without weights:
    it sets the sizes, dtypes and memory estimates that this version of the host expects. It knows the Wan2.2 VAE in its
    published width only, and original key names only.
    """

    def __init__(self, path: Path) -> None:
        info = identify_vae(path)
        with torch.device("meta"):
            super().__init__(sd=VAEInfo(path, type(info.config)()).network().state_dict())
        network = load_vae(info, dtype=self.vae_dtype, device=mm.vae_offload_device())
        self.first_stage_model = VAEStage(network)
        self.size = mm.module_size(self.first_stage_model)
        self.patcher = host.EngineHandle(self.first_stage_model, self.device, mm.vae_offload_device())


class VAEStage(host.Housed):
    """What the host calls on the network inside a VAE object; both directions report progress and can be cancelled."""

    network: VAE

    def decode(self, raw: Tensor) -> Tensor:
        """raw latents (B, C, T, h, w) -> (B, 3, F, H, W) float32; the host clamps once tiles are blended"""
        return stream.decode(self.network, raw, on_chunk=host.progress(), clamp=False)

    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, F, H, W) in [-1, 1] -> raw latent mean (B, C, T, h, w) float32"""
        return stream.encode(self.network, frames, on_chunk=host.progress())


def _is_model(path: Path) -> bool:
    identify(path)
    return True


def _is_text_encoder(path: Path) -> bool:
    umt5.open_encoder(path)
    return True


def _is_vae(path: Path) -> bool:
    identify_vae(path)
    return True
