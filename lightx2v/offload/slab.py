"""All tensors of a part of a network, side by side in one piece of memory, so that one copy moves them."""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# One of a module's own: parameters or buffers
Holder = dict[str, Any]
ALIGNMENT = 256  # bytes; the widest that matrix kernels ask of a weight's address is 128
PAGE = 4096  # bytes, of the operating system: what is pinned at a time
LARGE_PAGE = 1 << 21


@dataclass(frozen=True)
class _Entry:
    """One tensor, and the dictionaries of parameters or buffers that hold it: more than one where it is tied."""

    holders: tuple[tuple[Holder, str], ...]
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    parameter: bool
    stored: "Stored | None" = None  # where it is read from, if it does not rest in RAM
    home: Tensor | None = None  # what stands for it meanwhile

    def view(self, memory: Tensor) -> Tensor:
        found = memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)
        return nn.Parameter(found, requires_grad=False) if self.parameter else found


Views = tuple[Tensor, ...]
Layout = tuple[tuple[int, str, tuple[int, ...]], ...]


class Stored(Protocol):
    """Where a tensor is that does not rest in RAM."""

    def read(self, target: Tensor) -> None: ...


class Slab:
    """The parameters and buffers of modules, of any types, as views into one piece of host memory.

    modules: each gives its own tensors, not its children's. Afterwards they lie in host memory, wherever they were.
    stored: by id, tensors without contents that are read from elsewhere each time; they come after the others.
    memory: (kept,) uint8 to use; tensors without contents are what is there already. None: a piece of its own.
    nbytes: of all, gaps for alignment included. kept: of `host`, which has those that rest there.
    Raises ValueError for weights that were not read yet.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        stored: Mapping[int, Stored] | None = None,
        memory: Tensor | None = None,
    ) -> None:
        self._entries, tensors, self.kept, self.nbytes = _lay_out(modules, stored or {})
        if memory is None:
            _require_values(self._entries, tensors)
        resting = [entry for entry in self._entries if entry.stored is None]
        with torch.inference_mode(False), torch.no_grad():  # a slab outlives the request that it is made in
            self.host = _resting(resting, tensors, self.kept, memory)
            self._home = tuple(entry.view(self.host) if entry.home is None else entry.home for entry in self._entries)
        self.point(self._home)

    @property
    def layout(self) -> Layout:
        """Where each tensor lies, of which type and shape."""
        return tuple((entry.offset, str(entry.dtype), tuple(entry.shape)) for entry in self._entries)

    def to_read(self, memory: Tensor) -> list[tuple[Stored, Tensor]]:
        """What is stored elsewhere, and where it goes in a piece that begins with the first of it."""
        with torch.inference_mode(False), torch.no_grad():
            return [
                (entry.stored, replace(entry, offset=entry.offset - self.kept, parameter=False).view(memory))
                for entry in self._entries
                if entry.stored is not None
            ]

    def views(self, memory: Tensor) -> Views:
        """The tensors, in a piece of memory that holds, or will hold, a copy of the slab."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(entry.view(memory) for entry in self._entries)

    def point(self, views: Views) -> None:
        """Let the modules use these tensors."""
        for entry, view in zip(self._entries, views, strict=True):
            for holder, name in entry.holders:
                holder[name] = view

    def point_home(self) -> None:
        """Let the modules use the host's own, which nothing ever writes back to."""
        self.point(self._home)


def _lay_out(
    modules: Iterable[nn.Module], stored: Mapping[int, Stored]
) -> tuple[tuple[_Entry, ...], list[Tensor], int, int]:
    """Entries, the tensors of those that rest in RAM, bytes of these, bytes of all."""
    held: dict[int, tuple[Tensor, list[tuple[Holder, str]]]] = {}
    seen: set[int] = set()
    for module in modules:
        # a layer and its LoRA share their dictionaries
        for holder in (module._parameters, module._buffers):
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            for name, tensor in holder.items():
                if tensor is not None:
                    held.setdefault(id(tensor), (tensor, []))[1].append((holder, name))
    entries, tensors, offset, kept = [], [], 0, 0
    for tensor, holders in sorted(held.values(), key=lambda each: id(each[0]) in stored):
        origin = stored.get(id(tensor))
        nbytes = tensor.numel() * tensor.element_size()
        parameter = isinstance(tensor, nn.Parameter)
        home = None if origin is None else tensor
        entries.append(_Entry(tuple(holders), offset, nbytes, tensor.dtype, tensor.shape, parameter, origin, home))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        if origin is None:
            tensors.append(tensor)
            kept = offset
    return tuple(entries), tensors, kept, offset


def _require_values(entries: Sequence[_Entry], tensors: Sequence[Tensor]) -> None:
    for entry, tensor in zip(entries, tensors, strict=False):
        if tensor.is_meta:
            name = entry.holders[0][1]
            raise ValueError(f"'{name}' {list(tensor.shape)} has no values yet: read the weights before")


def _resting(entries: Sequence[_Entry], tensors: Sequence[Tensor], nbytes: int, memory: Tensor | None = None) -> Tensor:
    """Host memory that holds the tensors: the piece where they already lie, the one given, or a new one."""
    if memory is None and (found := _already(entries, tensors, nbytes)) is not None:
        return found
    memory = host_memory(nbytes) if memory is None else memory
    for entry, tensor in zip(entries, tensors, strict=True):
        if not tensor.is_meta:
            entry.view(memory).copy_(tensor)
    return memory


def paged(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def rest_bytes(modules: Iterable[nn.Module], stored: Mapping[int, Stored]) -> int:
    """Of the memory that a slab of these takes for what does not stay elsewhere."""
    return _lay_out(modules, stored)[2]


def _already(entries: Sequence[_Entry], tensors: Sequence[Tensor], nbytes: int) -> Tensor | None:
    """The piece of an earlier slab of the same layout, so that nothing is copied a second time."""
    if not tensors or tensors[0].device.type != "cpu":
        return None
    storage, start = tensors[0].untyped_storage(), tensors[0].data_ptr()
    begin = start - storage.data_ptr()
    if start % PAGE or begin + nbytes > storage.nbytes():
        return None
    for entry, tensor in zip(entries, tensors, strict=True):
        apart = tensor.untyped_storage().data_ptr() != storage.data_ptr() or not tensor.is_contiguous()
        if apart or (entry.nbytes and tensor.data_ptr() != start + entry.offset):
            return None
    return torch.empty(0, dtype=torch.uint8).set_(storage, begin, (nbytes,), (1,))


def host_memory(nbytes: int) -> Tensor:
    """(nbytes,) uint8 on pages of its own: two pieces that share a page cannot both be pinned.

    Not from PyTorch's pinned allocator, which rounds up to a power of two: 1.07 GB for a block of 0.71.
    """
    raw = torch.empty(-(-nbytes // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    _ask_for_large_pages(raw.data_ptr() + start, nbytes)
    return raw[start : start + nbytes]


def _ask_for_large_pages(address: int, nbytes: int) -> None:
    """Of 2 MB, where Linux has them: 28 GB are 7 million small ones, each of which is mapped and pinned by itself.

    A hint (madvise(2)); a system that does not take it is as it was.
    """
    if sys.platform == "linux" and nbytes >= LARGE_PAGE:
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(address, nbytes // PAGE * PAGE, mmap.MADV_HUGEPAGE)
