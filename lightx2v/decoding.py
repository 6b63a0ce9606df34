"""Latents to frames: which VAE and tiny autoencoder a pipeline uses, and whether whole frames fit in memory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lightx2v.config import one_of
from lightx2v.folder import ModelFolder
from lightx2v.latents import LatentFormat
from lightx2v.memory import vae_decode_bytes
from lightx2v.vae.loading import VAE, VAEInfo, identify_vae
from lightx2v.vae.stream import decode
from lightx2v.vae.tiling import Tiling, decode_tiled

log = logging.getLogger(__name__)
MODES = ("auto", "full", "tiled")
SAID = "Decoding in tiles of %d pixels: %s"


@dataclass(frozen=True)
class Decoding:
    """mode: "full" never decodes in tiles, "tiled" always, "auto" where memory is too small for whole frames."""

    mode: str = "auto"
    tiling: Tiling = field(default_factory=Tiling)

    def __post_init__(self) -> None:
        one_of("decode mode", self.mode, MODES)


@dataclass(frozen=True)
class VAEChoice:
    """Identified files in place of the folder's. full: encodes, and decodes unless there is a tiny one."""

    full: VAEInfo | None = None
    tiny: VAEInfo | None = None


@dataclass(frozen=True)
class VAERequest:
    """The options of `LightX2VPipeline.enable_lightvae`."""

    use_lightvae: bool
    use_tae: bool
    vae_path: str | Path | None
    tae_path: str | Path | None


def choose_vaes(folder: ModelFolder, space: LatentFormat, wanted: VAERequest) -> VAEChoice:
    """The files that are meant; without a path the folder is searched.

    Raises CheckpointError for a missing file and one of other latents, ValueError for one of the other sort.
    """
    full = tiny = None
    if wanted.vae_path or wanted.use_lightvae:
        full = identify_vae(wanted.vae_path or folder.light_vae(space), space)
        if full.tiny:
            raise ValueError(
                f"vae_path: {full.path} is a {full.name}, which cannot replace the VAE; give it as tae_path"
            )
    if wanted.use_tae:
        tiny = identify_vae(wanted.tae_path or folder.tiny_vae(space), space)
        if not tiny.tiny:
            raise ValueError(f"tae_path: {tiny.path} is a {tiny.name}, not a tiny autoencoder; give it as vae_path")
    elif wanted.tae_path:
        log.warning("tae_path is not used: use_tae is False")
    return VAEChoice(full, tiny)


def decode_video(
    info: VAEInfo, vae: VAE, raw: Tensor, how: Decoding, *, free: int | None = None, progress: bool = True
) -> Tensor:
    """Frames (B, 3, F, H, W) float32 in main memory, clamped to [-1, 1], of raw latents (B, C, T, h, w).

    free: bytes on the VAE's device, where they are known. Says so in the log where it takes tiles by itself: before, if
    whole frames would not fit, or once memory has run out.
    """
    weight, size = next(vae.parameters()), how.tiling.size
    needed = vae_decode_bytes(info, raw.shape, weight.dtype, frames=False)
    tiled = how.mode == "tiled"
    if how.mode == "auto" and free is not None and free < needed:
        log.warning(SAID, size, f"whole frames take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        tiled = True
    if not tiled:
        try:
            return _whole(vae, raw, progress)
        except torch.OutOfMemoryError:
            if how.mode == "full":
                raise
            log.warning(SAID, size, "memory ran out for whole frames")
    with _bar("tile", progress) as bar:
        tiles = decode_tiled(
            lambda part: decode(vae, part, clamp=False), raw, vae.space.stride, how.tiling, on_tile=_counter(bar)
        )
    return tiles.clamp_(-1, 1)


def _whole(vae: VAE, raw: Tensor, progress: bool) -> Tensor:
    rows, columns = (side * cell for side, cell in zip(raw.shape[3:], vae.space.stride[1:], strict=True))
    out = torch.empty(raw.shape[0], 3, 4 * raw.shape[2] - 3, rows, columns)
    with _bar("frame", progress) as bar:
        return decode(vae, raw, on_chunk=_counter(bar), out=out)


def _bar(unit: str, progress: bool) -> tqdm:
    return tqdm(desc="decode", unit=unit, disable=not progress, leave=False)


def _counter(bar: tqdm) -> Callable[[int, int], None]:
    def count(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return count
