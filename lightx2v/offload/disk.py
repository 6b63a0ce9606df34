"""Weights that stay in their file: read when a block's turn comes near, while the blocks before it compute.

What RAM cannot hold is read from the checkpoint itself, whatever its layout, by threads that write into two pieces of
pinned memory by turns. The system's page cache keeps what it has room for, so a pass reads from the disk only what is
not there; nothing of ours grows with the model.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import Header, read_into
from lightx2v.lora.branch import is_linear
from lightx2v.offload.lane import Buffer, pin
from lightx2v.offload.parts import filed_blocks, parts_of
from lightx2v.offload.slab import Slab, host_memory

log = logging.getLogger(__name__)
PIECES = 2  # one is filled while the other is copied
THREADS = 4  # copies out of the page cache take a core each at some GB/s


@dataclass(frozen=True)
class Filed:
    """A weight that is in a file and nowhere else."""

    header: Header
    name: str

    def read(self, target: Tensor) -> None:
        """Raises CheckpointError where the file is gone or damaged."""
        read_into(self.header, self.name, target)


def left_in_file(network: nn.Module, count: int, resident: int = 0) -> frozenset[str]:
    """Names of the weights of `count` blocks that can stay in the file: those of linear layers.

    resident: blocks that will stay on the device, which are chosen first. What is small stays in RAM, where LoRAs may
    change it.
    """
    blocks = parts_of(network)[0]
    indices = filed_blocks(len(blocks), min(count, len(blocks)), resident)
    chosen = {id(module) for index in indices for module in blocks[index].modules()}
    found = network.named_modules()
    return frozenset(f"{name}.weight" for name, module in found if id(module) in chosen and is_linear(module))


def filed(network: nn.Module, header: Header | None) -> dict[int, Filed]:
    """id of a parameter -> where it is, of those that were left in the file: they are on the meta device."""
    if header is None:
        return {}
    return {
        id(parameter): Filed(header, name)
        for name, parameter in network.named_parameters()
        if parameter.is_meta and name in header.tensors
    }


class Reader:
    """Fills buffers with what slabs have in files. Each is read whole, in the order of `start`, on threads of its own.

    nbytes: of the largest. pin_limit: bytes to pin at most; None: both pieces.
    A buffer's `use` waits for its reading, and raises what that raised.
    """

    def __init__(self, device: torch.device, nbytes: int, pin_limit: int | None = None) -> None:
        self._pieces = [host_memory(nbytes) for _ in range(PIECES)]
        self._pins = pin(self._pieces, device, pin_limit)
        self._turns = cycle([_Piece(piece) for piece in self._pieces])
        self._order = ThreadPoolExecutor(1, "lightx2v-order")
        self._threads = ThreadPoolExecutor(THREADS, "lightx2v-read")
        self._running: set[Future[None]] = set()

    @property
    def nbytes(self) -> int:
        return sum(piece.numel() for piece in self._pieces)

    def start(self, buffer: Buffer, slab: Slab) -> None:
        """Read a slab's weights into a buffer that is free already, after what was started before."""
        self._running = {future for future in self._running if not future.done()}
        future = self._order.submit(self._fill, buffer, slab)
        self._running.add(future)
        buffer.expect(future)

    def _fill(self, buffer: Buffer, slab: Slab) -> None:
        piece = next(self._turns)
        piece.wait()
        reads = [self._threads.submit(each.read, target) for each, target in slab.to_read(piece.memory)]
        wait(reads)  # all of them, before another block comes into this piece
        for read in reads:
            read.result()
        piece.copied = buffer.fill(piece.memory[: slab.nbytes - slab.kept], slab.kept)

    def drain(self) -> None:
        """Nothing is read any longer. What was about to be is left out, and what failed unseen is only logged."""
        for future in self._running:
            future.cancel()
        wait(self._running)
        for future in self._running:
            if not future.cancelled() and (error := future.exception()) is not None:
                log.debug("read ahead in vain: %s", error)
        self._running.clear()

    def release(self) -> None:
        self.drain()
        self._order.shutdown()
        self._threads.shutdown()
        self._pins.release()


@dataclass
class _Piece:
    memory: Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def largest(slabs: Sequence[Slab]) -> int:
    """Bytes of the most that one slab has in files."""
    return max((slab.nbytes - slab.kept for slab in slabs), default=0)
