"""Copies from host memory to a device, beside what the device computes. All that is CUDA's own in streaming is here."""

import logging
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from lightx2v.offload.slab import PAGE

log = logging.getLogger(__name__)
THREADS = 8  # pinning walks the pages one by one, some 0.5 s a GB and core
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the process


class Lane:
    """Where copies to one device run: a stream of their own on CUDA, at once elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def buffer(self, nbytes: int) -> "Buffer":
        """Device memory of that many bytes to be filled again and again."""
        return Buffer(nbytes, self.device, self._copies)

    def drain(self) -> None:
        """What the device computes from here on runs after all copies: their targets may be freed."""
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)


class Buffer:
    """Device memory whose contents come and go. No call waits on the host; the order is kept by events.

    Fill, `use` before what reads it is started, `release` once that is started; then fill again.
    """

    def __init__(self, nbytes: int, device: torch.device, copies: torch.cuda.Stream | None) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._copies = copies
        if copies is not None:
            self._filled, self._read = torch.cuda.Event(), torch.cuda.Event()
        self._expected: Future[None] | None = None
        self.release()  # the allocator may hand out memory that earlier work on this stream still reads

    def fill(self, source: Tensor, at: int = 0) -> torch.cuda.Event | None:
        """Start copying (n,) bytes to byte `at` and after, once all that reads what is there now is done.

        Returns what tells when that is copied, where copies run by themselves. May be called on any thread.
        """
        target = self.memory[at : at + source.numel()]
        if self._copies is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read)
            target.copy_(source, non_blocking=True)
            self._filled.record(self._copies)
            copied = torch.cuda.Event()
            copied.record(self._copies)
        return copied

    def expect(self, filling: "Future[None]") -> None:
        """Another thread fills this; `use` waits for it on the host, and raises what it raised."""
        self._expected = filling

    def use(self) -> None:
        """What the device computes from here on sees the copy."""
        if self._expected is not None:
            expected, self._expected = self._expected, None
            expected.result()
        if self._copies is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._filled)

    def release(self) -> None:
        """What the device was given to compute until here may still read; what comes later does not."""
        if self._copies is not None:
            self._read.record(torch.cuda.current_stream(self.memory.device))


class Pins:
    """Host memory that is pinned until `release`, or until nobody holds this. nbytes: how much."""

    def __init__(self, pieces: list[Tensor], device: torch.device) -> None:
        self.nbytes = sum(map(_pages, pieces))
        self._end = weakref.finalize(self, _unpin, pieces, device)
        self._end.atexit = False  # CUDA may be gone by then

    def release(self) -> None:
        """Once; copies that still run are waited for."""
        self._end()


def pin(pieces: Iterable[Tensor], device: torch.device, limit: int | None = None) -> Pins:
    """Pin host memory, so that copies from it run beside everything else.

    pieces: from `host_memory`, each on pages of its own. limit: bytes to pin at most.
    Where the system refuses, the rest stays as it is, which the log says: copies from there are slower and hold up
    the host. On devices other than CUDA nothing is pinned.
    """
    chosen: list[Tensor] = []
    total = 0
    for piece in pieces if device.type == "cuda" else ():
        size = _pages(piece)
        if size and (limit is None or total + size <= limit):
            chosen.append(piece)
            total += size
    if not chosen:
        return Pins([], device)
    with ThreadPoolExecutor(THREADS, "lightx2v-pin") as pool:
        registered = list(pool.map(partial(_register, device=device), chosen))
    pinned = [piece for piece, done in zip(chosen, registered, strict=True) if done]
    if len(pinned) < len(chosen):
        log.warning(
            "only %.1f of %.1f GB of weights could be pinned in memory; copies to the GPU are slower than they could "
            "be. Close other programs, or raise the limit of locked memory (ulimit -l)",
            sum(map(_pages, pinned)) / 1e9,
            total / 1e9,
        )
    return Pins(pinned, device)


def _register(piece: Tensor, device: torch.device) -> bool:
    """Whether a piece is pinned now. Errors and the GPU in use are each thread's own."""
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), _pages(piece), PORTABLE)) == 0:
            return True
        _clear_error(device)
        return False


def _pages(piece: Tensor) -> int:
    return -(-piece.numel() // PAGE) * PAGE


def _unpin(pieces: list[Tensor], device: torch.device) -> None:
    if pieces:
        torch.cuda.synchronize(device)  # a copy may still be reading
    for piece in pieces:
        torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())


def _clear_error(device: torch.device) -> None:
    """CUDA repeats the error of a refused call at the next check; take it here, where it is understood."""
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        log.debug("after a refused pin: %s", error)


def link_rate(device: torch.device) -> float | None:
    """Bytes a second from pinned host memory to the device, measured on 64 MB; None for devices other than CUDA."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source, non_blocking=True)
    start.record(torch.cuda.current_stream(device))
    target.copy_(source, non_blocking=True)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return source.numel() / (start.elapsed_time(end) / 1000)
