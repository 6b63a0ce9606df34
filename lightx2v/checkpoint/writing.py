"""Safetensors files written one tensor at a time, so that a file may be larger than the memory."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightx2v.checkpoint.header import DTYPES
from lightx2v.unfinished import unfinished

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the data's first byte


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Iterable[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write what `entries` announce, from `tensors` in any order, which are taken one at a time.

    The file gets its name when it is complete: whatever fails or is cancelled before leaves nothing behind.
    Raises OSError, at once where the system can tell, for a disk that is too full, and ValueError for tensors that are
    not as announced.
    """
    # Wide types first, so that each tensor begins at a multiple of its type's size.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    places: dict[str, tuple[Entry, int]] = {}
    listed: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        places[entry.name] = entry, offset
        span = [offset, offset + entry.nbytes]
        listed[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.nbytes
    header = json.dumps(listed, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with unfinished(path) as partial, partial.open("wb") as file:
        _reserve(file, 8 + len(header) + offset)
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            entry, start = places.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, {entry} was announced")
            file.seek(8 + len(header) + start)
            file.write(_bytes(tensor))
        if places:
            raise ValueError(f"{len(places)} tensors were announced and not given, first '{next(iter(places))}'")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _reserve(file: BinaryIO, nbytes: int) -> None:
    """Take all the room at once: a full disk shows before hours of work, not after them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
