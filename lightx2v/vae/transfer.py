"""Frames between main memory and a GPU, which travel while the GPU computes."""

from __future__ import annotations

import torch
from torch import Tensor


def bring(frames: Tensor, like: Tensor) -> Tensor:
    """Frames on the device and in the dtype of `like`. On the way to a GPU they are rounded before they travel."""
    if like.device.type != "cuda" or frames.device.type != "cpu":
        return frames.to(like)
    pinned = torch.empty(frames.shape, dtype=like.dtype, pin_memory=True)
    return pinned.copy_(frames).to(like.device, non_blocking=True)


class Landing:
    """Puts chunks of frames one after the other into `out` (B, 3, F, H, W).

    From a GPU to main memory a chunk travels while the next one is computed, in the dtype it was computed in.
    """

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._flying: tuple[torch.cuda.Event, Tensor, Tensor] | None = None

    def put(self, frames: Tensor, stop: int) -> None:
        """frames (B, 3, t, H, W) become the frames before `stop`."""
        place = self._out[:, :, stop - frames.shape[2] : stop]
        if frames.device.type != "cuda" or place.device.type != "cpu":
            place.copy_(frames)
            return
        frames = frames.contiguous()
        pinned = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        pinned.copy_(frames, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(frames.device))
        self.finish()
        self._flying = (arrived, pinned, place)

    def finish(self) -> None:
        """Wait until all frames that were put are in `out`."""
        if self._flying is not None:
            arrived, pinned, place = self._flying
            arrived.synchronize()
            place.copy_(pinned)
            self._flying = None
