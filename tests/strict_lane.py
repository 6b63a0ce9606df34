"""Copies that check on a CPU what a GPU's would need: the order of filling, using and releasing."""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.offload.lane import Buffer, Lane

CPU = torch.device("cpu")
GARBAGE = 0xFF  # bytes of NaN in every float type


class StrictBuffer(Buffer):
    """Copies as late as it may, on `use`, and spoils what is there on `release`: reading out of turn gives NaN."""

    def __init__(self, nbytes: int, lane: StrictLane) -> None:
        self._source: Tensor | None = None
        self._lane = lane
        self._read = False  # by the device, since it was filled
        super().__init__(nbytes, CPU, None)

    def fill(self, source: Tensor) -> None:
        assert not self._read, "filled while the device may still read it"
        self._lane.copied += source.numel()
        self._source = source.clone()

    def use(self) -> None:
        if self._source is not None:
            self.memory[: self._source.numel()] = self._source
        self._source, self._read = None, True

    def release(self) -> None:
        self.memory.fill_(GARBAGE)
        self._read = False


class StrictLane(Lane):
    def __init__(self) -> None:
        super().__init__(CPU)
        self.copied = 0  # bytes

    def buffer(self, nbytes: int) -> Buffer:
        return StrictBuffer(nbytes, self)
