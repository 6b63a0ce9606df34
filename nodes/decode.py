"""Latents to frames."""

from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor

from lightx2v.config import one_of
from lightx2v.decoding import tighter
from lightx2v.offload import DoesNotFitError
from lightx2v.offload.shortage import Shortage, caught, says_if_lost
from lightx2v.report import Watch
from lightx2v.vae.tiling import Tiling, decode_tiled

from . import host
from .report import KEY, so_far
from .vae import EngineVAE

MODES = ("auto", "full", "tiled")


class LightX2VDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LightX2VDecode",
            display_name="Decode (LightX2V)",
            category="LightX2V/latent",
            description="Turns a video latent into frames, one latent frame at a time, whole or in tiles, with "
            "progress and cancel.",
            inputs=[
                io.Latent.Input("latent", tooltip="From a sampler; 81 frames of 832x480 are 21 latent frames."),
                io.Vae.Input("vae", tooltip="From Load VAE (LightX2V), or ComfyUI's own Load VAE."),
                *cls._tile_inputs(),
            ],
            outputs=[
                io.Image.Output("frames", display_name="frames"),
                io.Latent.Output("reported", display_name="latent"),
            ],
        )

    @staticmethod
    def _tile_inputs() -> list[io.Input]:
        return [
            io.Combo.Input(
                "mode",
                options=list(MODES),
                default="auto",
                optional=True,
                tooltip="auto: tiles only where GPU memory is too small for whole frames (Wan2.1's VAE at 832x480 in "
                "bf16: 4.2 GB, in tiles of 256: 0.7 GB). full: never tiles. tiled: always.",
            ),
            host.advanced(
                io.Int.Input(
                    "tile_size",
                    default=256,
                    min=64,
                    max=4096,
                    step=16,
                    optional=True,
                    tooltip="Side of a tile in pixels. Smaller ones take less memory, more time, and show more.",
                )
            ),
            host.advanced(
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=2048,
                    step=16,
                    optional=True,
                    tooltip="Pixels that neighbouring tiles share, where one fades into the other; at most half of "
                    "tile_size. At 64 no seam is seen.",
                )
            ),
            host.advanced(
                io.Int.Input(
                    "tile_frames",
                    default=0,
                    min=0,
                    max=4096,
                    step=4,
                    optional=True,
                    tooltip="Frames of a tile, for VAEs that hold the whole video in memory. 0: all of them, right for "
                    "Wan's VAEs, which stream. Else at least 20: tiles overlap by 16.",
                )
            ),
        ]

    @classmethod
    @says_if_lost
    def execute(
        cls,
        latent: dict[str, Any],
        vae: comfy.sd.VAE,
        mode: str = "auto",
        tile_size: int = 256,
        overlap: int = 64,
        tile_frames: int = 0,
    ) -> io.NodeOutput:
        host.cancel_point()
        one_of("mode", mode, MODES)
        samples, tiling = latent["samples"], Tiling(tile_size, overlap, tile_frames)
        watch = Watch(getattr(vae, "device", None) or mm.get_torch_device())
        with watch.stage("decode") as lines:
            tiled = mode == "tiled" or (mode == "auto" and not _fits(vae, samples))
            frames, words = (None if tiled else _whole(vae, samples, mode)), "whole frames"
            if frames is None:
                frames, tiling = _in_tiles(vae, samples, tiling, once_more=tiled and mode == "auto")
                words = f"tiles of {tiling.size} pixels"
            _require_finite(frames, vae)
            lines.append(f"decoded {words}")
        reported = {**latent, KEY: so_far(latent).then(*watch.stages)}
        return io.NodeOutput(frames.flatten(0, 1) if frames.ndim == 5 else frames, reported)


def _require_finite(frames: Tensor, vae: comfy.sd.VAE) -> None:
    """Raise FloatingPointError for what would be a black video. Our own VAEs say it themselves, and where it began."""
    if isinstance(vae, EngineVAE) or bool(frames.sum(dtype=torch.float32).isfinite()):
        return
    raise FloatingPointError(
        f"decoding gave NaN or infinity (weights in {getattr(vae, 'vae_dtype', 'an unknown type')}): the latents or "
        "the VAE's file hold them, or the type is too narrow; sample again, load the VAE with LightX2VLoadVAE, or "
        "start ComfyUI with --bf16-vae"
    )


def _fits(vae: comfy.sd.VAE, samples: Tensor) -> bool:
    """Whether whole frames fit beside the VAE, by its own estimate and the host's free memory; says so if not."""
    if not isinstance(vae, comfy.sd.VAE) or samples.ndim != 5:
        return True  # nothing to ask, or nothing to cut
    wanted = vae.memory_used_decode(samples[:1].shape, vae.vae_dtype)
    free = host.room_beside(vae.patcher, wanted)
    if free < wanted:
        host.log.warning("Decoding in tiles: whole frames take %.1f GB, %.1f GB are free", wanted / 1e9, free / 1e9)
    return free >= wanted


def _whole(vae: comfy.sd.VAE, samples: Tensor, mode: str) -> Tensor | None:
    """Frames (B, F, H, W, 3) in [0, 1]; None where memory ran out and tiles are allowed. ComfyUI's own VAEs take tiles
    by themselves."""
    try:
        return vae.decode_whole(samples) if isinstance(vae, EngineVAE) else vae.decode(samples)
    except mm.OOM_EXCEPTION:
        if mode != "auto":
            raise
        host.log.warning("Too little GPU memory to decode whole frames; decoding in tiles")
    return None


def _in_tiles(vae: comfy.sd.VAE, samples: Tensor, tiling: Tiling, *, once_more: bool) -> tuple[Tensor, Tiling]:
    """Frames, and the tiles that they were made of: where memory runs out and these may be others, smaller ones."""
    made = caught(lambda: _tiled(vae, samples, tiling))
    smaller = tighter(tiling, None) if once_more else None
    if isinstance(made, Shortage) and smaller is not None:
        host.log.warning("Too little GPU memory for tiles of %d pixels; taking %d", tiling.size, smaller.size)
        host.make_room()
        tiling = smaller
        made = caught(lambda: _tiled(vae, samples, tiling))
    if isinstance(made, Shortage):
        raise DoesNotFitError(
            f"GPU memory ran out while decoding in tiles of {tiling.size} pixels ({made.said}): set mode to tiled and "
            f"tile_size to {max(64, tiling.size // 32 * 16)}, or take a tiny autoencoder"
        )
    return made, tiling


def _tiled(vae: comfy.sd.VAE, samples: Tensor, tiling: Tiling) -> Tensor:
    if isinstance(vae, EngineVAE):
        return vae.decode_in_tiles(samples, tiling)
    cell, frames = vae.spacial_compression_decode(), vae.temporal_compression_decode()
    if samples.ndim != 5 or not isinstance(cell, int) or frames is None:
        raise ValueError("mode is tiled, which needs a video latent and a video VAE; use ComfyUI's VAE Decode (Tiled)")

    def decode(part: Tensor) -> Tensor:
        return vae.decode(part).movedim(-1, 1)

    return decode_tiled(decode, samples, (frames, cell, cell), tiling, on_tile=host.progress()).movedim(1, -1)
