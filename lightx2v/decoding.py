"""Latents to frames: which VAE and tiny autoencoder a pipeline uses, and whether whole frames fit in memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lightx2v.config import one_of
from lightx2v.folder import ModelFolder
from lightx2v.latents import LatentFormat
from lightx2v.memory import vae_decode_bytes
from lightx2v.offload.plan import DoesNotFitError
from lightx2v.offload.shortage import Shortage, caught, free_unused
from lightx2v.vae.loading import VAE, VAEInfo, identify_vae
from lightx2v.vae.stream import OnChunk, StreamedVAE, decode
from lightx2v.vae.tiling import Tiling, decode_tiled, largest_tile, plan

log = logging.getLogger(__name__)
MODES = ("auto", "full", "tiled")
TILES = tuple(Tiling(size, 64) for size in (128, 192, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1024))
SAID = "Decoding in tiles of %d pixels: %s"


@dataclass(frozen=True)
class Decoding:
    """mode: "full" never decodes in tiles, "tiled" always, "auto" where memory is too small for whole frames.

    tiling: None takes tiles of 256 pixels where they are chosen, and in "auto" the best that fit.
    """

    mode: str = "auto"
    tiling: Tiling | None = None

    @staticmethod
    def of(mode: str, size: int | None, overlap: int) -> "Decoding":
        """size: None with the usual overlap names no tiles."""
        named = size is not None or overlap != Tiling.overlap
        return Decoding(mode, Tiling(Tiling.size if size is None else size, overlap) if named else None)

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


def fitting(info: VAEInfo, shape: Sequence[int], dtype: torch.dtype, free: int | None) -> Tiling | None:
    """How latents (B, C, T, h, w) decode in that many bytes: None for whole frames, else tiles.

    Of the tiles that fit those with the fewest pixels to decode, the largest of them; the smallest where none fits.
    free None: not known.
    """
    if free is None or vae_decode_bytes(info, shape, dtype, frames=False) <= free:
        return None
    stride = info.space.stride

    def needed(tiling: Tiling) -> int:
        return vae_decode_bytes(info, (*shape[:2], *largest_tile(shape[2:], stride, tiling)), dtype, frames=False)

    def pixels(tiling: Tiling) -> int:
        _, rows, columns = plan(shape[2:], stride, tiling)
        return sum(stop - start for start, stop in rows.cells) * sum(stop - start for start, stop in columns.cells)

    fit = [tiling for tiling in TILES if needed(tiling) <= free]
    return min(fit, key=lambda tiling: (pixels(tiling), -tiling.size), default=TILES[0])


def decode_video(
    info: VAEInfo,
    vae: VAE,
    raw: Tensor,
    how: Decoding,
    *,
    free: int | None = None,
    progress: bool = True,
    make_room: Callable[[], None] = lambda: None,
) -> Tensor:
    """Frames (B, 3, F, H, W) float32 in main memory, clamped to [-1, 1], of raw latents (B, C, T, h, w).

    free: bytes on the VAE's device, where they are known. Where whole frames do not fit, or memory runs out, "auto"
    takes tiles, or smaller ones, once, which the log says; make_room is called before, to free what else can wait.
    Raises DoesNotFitError where memory runs out even so, or with a mode that was chosen.
    """
    first = (how.tiling or Tiling()) if how.mode == "tiled" else None
    dtype = next(vae.parameters()).dtype
    if how.mode == "auto" and (first := fitting(info, raw.shape, dtype, free)) is not None:
        needed = vae_decode_bytes(info, raw.shape, dtype, frames=False)
        first = how.tiling or first
        log.warning(SAID, first.size, f"whole frames take {needed / 1e9:.1f} GB, {(free or 0) / 1e9:.1f} GB are free")
    second = tighter(first, how.tiling) if how.mode == "auto" else None

    def decoded(tiling: Tiling | None) -> Tensor | Shortage:
        run = partial(_whole, vae, raw) if tiling is None else partial(_tiled, vae, raw, tiling)
        return caught(lambda: run(progress))

    made = decoded(first)
    if isinstance(made, Shortage) and second is not None:
        make_room()
        free_unused()
        log.warning(SAID, second.size, f"memory ran out for {_words(first)}")
        first, made = second, decoded(second)
    if isinstance(made, Shortage):
        raise DoesNotFitError(too_large(raw, vae, first, made))
    return made


def tighter(tiling: Tiling | None, named: Tiling | None) -> Tiling | None:
    """The tiles to try after that; None where there are no smaller ones. named: those for whole frames."""
    if tiling is None:
        return named or Tiling()
    smaller = [each for each in TILES if each.size <= 0.75 * tiling.size]
    return smaller[-1] if smaller else None


def _words(tiling: Tiling | None) -> str:
    return "whole frames" if tiling is None else f"tiles of {tiling.size} pixels"


def too_large(raw: Tensor, vae: StreamedVAE, tiling: Tiling | None, shortage: Shortage) -> str:
    """Memory that ran out while decoding, in words."""
    width, height = (side * cell for side, cell in zip(raw.shape[:2:-1], vae.space.stride[:0:-1], strict=True))
    less = (tiling.size if tiling else 512) // 2
    advice = f"decode in tiles of {less} pixels" if less >= TILES[0].size else "make the video smaller"
    return (
        f"GPU memory ran out while decoding {width}x{height} in {_words(tiling)} ({shortage.said}): {advice}, take a "
        "tiny autoencoder, or close what else uses the GPU"
    )


def _tiled(vae: VAE, raw: Tensor, tiling: Tiling, progress: bool) -> Tensor:
    with counted("tile", progress) as count:
        tiles = decode_tiled(lambda part: decode(vae, part, clamp=False), raw, vae.space.stride, tiling, on_tile=count)
    return tiles.clamp_(-1, 1)


def _whole(vae: VAE, raw: Tensor, progress: bool) -> Tensor:
    with counted("frame", progress) as count:
        return decode(vae, raw, on_chunk=count, out=room_for(vae, raw))


def room_for(vae: StreamedVAE, raw: Tensor) -> Tensor:
    """Main memory for the frames (B, 3, F, H, W) of latents."""
    rows, columns = (side * cell for side, cell in zip(raw.shape[3:], vae.space.stride[1:], strict=True))
    return torch.empty(raw.shape[0], 3, 4 * raw.shape[2] - 3, rows, columns)


@contextmanager
def counted(unit: str, progress: bool) -> Iterator[OnChunk]:
    """A progress bar, which the callable given is told of how much is done, and of how much in all."""
    with tqdm(desc="decode", unit=unit, disable=not progress, leave=False) as bar:

        def count(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield count
