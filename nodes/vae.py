"""Load VAE, and the engine's VAEs as ComfyUI's own VAE objects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor

from lightx2v.memory import vae_decode_bytes, vae_encode_bytes
from lightx2v.offload.shortage import unless_lost
from lightx2v.vae import stream
from lightx2v.vae.loading import VAE, VAEInfo, identify_vae, load_vae
from lightx2v.vae.tiling import Tiling, decode_tiled, largest_tile

from . import host


class LightX2VLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VLoadVAE",
            display_name="Load VAE (LightX2V)",
            category="LightX2V/loaders",
            description="Loads the VAE of Wan2.1 and Wan2.2 A14B, full (127 M parameters) or LightVAE (8 M), that of "
            "TI2V-5B (705 M) or HunyuanVideo-1.5 (1261 M), or a tiny autoencoder (11 M). Fits ComfyUI's own nodes.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=_vae_files(),
                    tooltip="Files of models/vae: wan_2.1_vae.safetensors (254 MB) for Wan2.1 and Wan2.2 A14B, "
                    "wan2.2_vae.safetensors (1.4 GB) for TI2V-5B, hunyuanvideo15_vae_fp16.safetensors (2.5 GB) for "
                    "HunyuanVideo-1.5. Tiny autoencoders of models/vae_approx (23 MB) are fast and less exact: taew2_1 "
                    "or lighttaew2_1 for the first two, taew2_2 or lighttaew2_2 for the third, taehv1_5 or "
                    "lighttaehy1_5 for the fourth.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="VAE")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, **_: Any) -> tuple[str, int, int]:
        return host.fingerprint(*_place(vae_name))

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(EngineVAE(host.locate(*_place(vae_name))))


class EngineVAE(comfy.sd.VAE):
    """ComfyUI's VAE object with our network inside, so that every native node takes it.

    The host's constructor runs first, on the tensor names and shapes of the family's published VAE and without weights:
    it sets the sizes and dtypes that this version of the host expects. It knows the Wan2.2 VAE in its published width
    only, and original key names only. Its numbers for memory and for the range of pixels are then replaced by ours.
    """

    def __init__(self, path: Path) -> None:
        info = identify_vae(path)
        with torch.device("meta"):
            super().__init__(sd=VAEInfo(path, type(info.config)()).network().state_dict())
        network = load_vae(info, dtype=self.vae_dtype, device=mm.vae_offload_device())
        self.first_stage_model = VAEStage(network)
        self.size = mm.module_size(self.first_stage_model)
        self.patcher = host.EngineHandle(self.first_stage_model, self.device, mm.vae_offload_device())
        self.process_input = lambda image: image * 2 - 1
        self.process_output = lambda image: ((image + 1) / 2).clamp(0, 1)
        beside = self.output_device == self.device  # whether the finished frames take of the same memory
        self.memory_used_decode = lambda shape, dtype: vae_decode_bytes(info, shape, dtype, frames=beside)
        self.memory_used_encode = lambda shape, dtype: vae_encode_bytes(info, shape[-2], shape[-1], dtype)

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """(B, C, T, h, w) -> (B, F, H, W, 3) in [0, 1]; once more in tiles where memory runs out, which is logged."""
        try:
            return self.decode_whole(samples_in)
        except mm.OOM_EXCEPTION:
            host.log.warning("Too little GPU memory to decode whole frames; decoding in tiles")
        return self.decode_in_tiles(samples_in, Tiling())

    def decode_whole(self, samples: Tensor) -> Tensor:
        """The same, one latent frame at a time; raises where memory runs out."""
        self._bring(samples[:1].shape)
        return self._pictures([self.first_stage_model.decode(part.to(self.device)) for part in samples.split(1)])

    def decode_in_tiles(self, samples: Tensor, tiling: Tiling) -> Tensor:
        """The same, tile by tile, each of which is decoded one latent frame at a time."""
        stage, stride = self.first_stage_model, self.first_stage_model.network.space.stride
        self._bring((1, samples.shape[1], *largest_tile(samples.shape[2:], stride, tiling)))

        def decode(part: Tensor) -> Tensor:
            return stage.decode(part.to(self.device), on_chunk=host.cancel_point)

        on_tile = host.progress()
        return self._pictures(
            [decode_tiled(decode, part, stride, tiling, on_tile=on_tile) for part in samples.split(1)]
        )

    def _bring(self, shape: Any) -> None:
        host.on_gpu(self.patcher, self.memory_used_decode(shape, self.vae_dtype))

    def _pictures(self, videos: list[Tensor]) -> Tensor:
        """Videos (1, 3, F, H, W) in [-1, 1] as (B, F, H, W, 3) in [0, 1] where the host keeps pictures."""
        joined = videos[0] if len(videos) == 1 else torch.cat(videos)
        return joined.to(self.output_device).add_(1).mul_(0.5).clamp_(0, 1).movedim(1, -1)


class VAEStage(host.Housed):
    """What the host calls on the network inside a VAE object; both directions report progress and can be cancelled."""

    network: VAE

    def decode(self, raw: Tensor, on_chunk: Callable[[int, int], None] | None = None) -> Tensor:
        """raw latents (B, C, T, h, w) -> (B, 3, F, H, W) float32 in main memory, or wherever the host keeps pictures.

        Not clamped: the host does that once tiles are blended.
        """
        stride = self.network.space.stride
        height, width = (cell * side for cell, side in zip(stride[1:], raw.shape[3:], strict=True))
        shape = (raw.shape[0], 3, 4 * raw.shape[2] - 3, height, width)
        out = torch.empty(shape, dtype=torch.float32, device=mm.intermediate_device())
        report = on_chunk or host.progress()
        return unless_lost(lambda: stream.decode(self.network, raw, on_chunk=report, out=out, clamp=False))

    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, 3, F, H, W) in [-1, 1] -> raw latent mean (B, C, T, h, w) float32.

        Frames after the last 4n + 1 are left out, as in the host's own VAEs.
        """
        whole = (frames.shape[2] - 1) // 4 * 4 + 1
        return unless_lost(lambda: stream.encode(self.network, frames[:, :, :whole], on_chunk=host.progress()))


def _vae_files() -> list[str]:
    full, approximate = host.files("vae", _is_vae), host.files(host.APPROX, _is_vae)
    return [*full, *(f"{host.APPROX}/{name}" for name in approximate if not name.startswith(host.DEMO_PREFIX))]


def _place(name: str) -> tuple[str, str]:
    """Model folder and name of a picked file."""
    folder, _, rest = name.partition("/")
    return (host.APPROX, rest) if folder == host.APPROX and rest else ("vae", name)


def _is_vae(path: Path) -> bool:
    identify_vae(path)
    return True
