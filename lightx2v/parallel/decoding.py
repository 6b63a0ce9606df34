"""Latents to frames on all ranks together: what lightx2v/decoding.py does on one."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightx2v.decoding import SAID, Decoding, counted, fitting, room_for, too_large
from lightx2v.offload.plan import DoesNotFitError
from lightx2v.offload.shortage import Shortage, caught
from lightx2v.parallel.agreement import StoppedElsewhereError, first_said
from lightx2v.parallel.frames import SplitVAE, decode
from lightx2v.parallel.mesh import Mesh
from lightx2v.vae.loading import VAE, VAEInfo
from lightx2v.vae.stream import OnChunk
from lightx2v.vae.tiling import Tiling, decode_tiled, tiles_of

log = logging.getLogger(__name__)
UNKNOWN = 1 << 62  # bytes: more than any device has


def decode_video(
    mesh: Mesh, info: VAEInfo, vae: VAE, raw: Tensor, how: Decoding, *, free: int | None = None, progress: bool = True
) -> Tensor | None:
    """Frames (B, 3, F, H, W) float32 in main memory, clamped to [-1, 1], on the first rank; None on the others.

    Every rank of the mesh calls it with the same raw latents (B, C, T, h, w), and decodes its own rows.
    free: bytes on this rank's device, where they are known. "auto" takes tiles where the rank with the least memory has
    too little for its rows of whole frames. Raises DoesNotFitError, which must end all ranks, where memory runs out
    even so: what the others have sent and wait for cannot be taken back. Frames that are not finite raise
    FloatingPointError on the first rank and StoppedElsewhereError on the others.
    """
    split = SplitVAE(vae, mesh.whole)
    tiling = (how.tiling or Tiling()) if how.mode == "tiled" else None
    room = _room(mesh, split, raw, free)
    if how.mode == "auto" and (found := fitting(info, raw.shape, next(vae.parameters()).dtype, room)) is not None:
        tiling = how.tiling or found
        log.warning(SAID, tiling.size, f"the ranks together have {(room or 0) / 1e9:.1f} GB for whole frames, too few")

    def by_all(part: Tensor, **options: Any) -> Tensor | None:
        return _by_all(mesh, split, part, tiling, **options)

    with counted("frame" if tiling is None else "tile", progress and mesh.first) as count:
        if tiling is None:
            return by_all(raw, on_chunk=count, out=room_for(split, raw) if split.first else None)
        return _tiled(by_all, split, raw, tiling, count)


def _by_all(mesh: Mesh, split: SplitVAE, raw: Tensor, tiling: Tiling | None, **options: Any) -> Tensor | None:
    """`decode` on all ranks, after which all know whether the first found frames that are not finite."""
    made: list[Tensor | None] = []
    broken: list[FloatingPointError] = []

    def work() -> None:
        try:
            made.append(decode(split, raw, **options))
        except FloatingPointError as error:
            broken.append(error)

    shortage = caught(work)
    if isinstance(shortage, Shortage):  # the others may be in the middle of an exchange: there is no way to tell them
        raise DoesNotFitError(too_large(raw, split, tiling, shortage))
    stopped = first_said(mesh, str(broken[0]) if broken else None)
    if broken:
        raise broken[0]
    if stopped is not None:
        raise StoppedElsewhereError(*stopped)
    return made[0]


def _room(mesh: Mesh, split: SplitVAE, raw: Tensor, free: int | None) -> int | None:
    """Bytes that all ranks have together for whole frames, by the one with the least; None where nobody knows."""
    least = torch.tensor(UNKNOWN if free is None else free)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.control)
    most = split.most_rows(raw.shape[3])  # what a rank reads of its neighbours takes room as well
    return None if least == UNKNOWN else int(least) * raw.shape[3] // most


def _tiled(
    by_all: Callable[..., Tensor | None], split: SplitVAE, raw: Tensor, tiling: Tiling, count: OnChunk
) -> Tensor | None:
    stride = split.space.stride
    if not split.first:
        for part in tiles_of(raw, stride, tiling):
            by_all(part, clamp=False)
        return None

    def decoded(part: Tensor) -> Tensor:
        frames = by_all(part, clamp=False)
        assert frames is not None  # this is the first rank
        return frames

    return decode_tiled(decoded, raw, stride, tiling, on_tile=count).clamp_(-1, 1)
