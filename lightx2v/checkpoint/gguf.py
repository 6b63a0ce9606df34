"""GGUF files: header and raw tensors. Source of the format: ggml-org/ggml, docs/gguf.md, versions 2 and 3."""

import mmap
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lightx2v.checkpoint.header import AGAIN, MAX_AXES, CheckpointError, Header, Stamp, TensorInfo, check_tensor

MAGIC = b"GGUF"
MAX_NESTING = 4
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # city96/ComfyUI-GGUF: the shape of a tensor that GGML's four axes cannot say
PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# Number -> name, values in a block, bytes of a block (ggml-common.h).
BLOCKS = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}


@dataclass
class _Cursor:
    """A place in the header that moves as values are read; every read is checked against the file's end."""

    path: Path
    data: mmap.mmap
    at: int = 0

    def skip(self, count: int) -> int:
        """Move on by `count` bytes; returns where they begin."""
        start = self.at
        if count > len(self.data) - start:
            raise CheckpointError(f"{self.path}: truncated: the GGUF header ends after {len(self.data)} bytes; {AGAIN}")
        self.at = start + count
        return start

    def value(self, layout: str) -> int | float | bool:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def count(self, least: int) -> int:
        """How many of something follow, each of at least `least` bytes."""
        number = int(self.value("<Q"))
        if number * least > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path}: damaged: the GGUF header announces {number} values at byte {self.at}, "
                f"the file has {len(self.data)} bytes; {AGAIN}"
            )
        return number

    def text(self) -> str:
        length = self.count(1)
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def entry(self, depth: int = 0) -> str:
        """A metadata value as text; of an array of numbers all of them, of other arrays nothing."""
        return self._typed(int(self.value("<I")), depth)

    def _typed(self, kind: int, depth: int) -> str:
        if kind in SCALARS:
            return str(self.value(SCALARS[kind]))
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == MAX_NESTING:
            raise CheckpointError(f"{self.path}: damaged: GGUF metadata of unknown type {kind}; {AGAIN}")
        inner = int(self.value("<I"))
        if inner in SCALARS:
            size = struct.calcsize(SCALARS[inner])
            number = self.count(size)
            start = self.skip(number * size)
            if number > 64:  # a vocabulary's scores
                return ""
            return " ".join(
                str(struct.unpack_from(SCALARS[inner], self.data, start + i * size)[0]) for i in range(number)
            )
        for _ in range(self.count(8)):
            self._typed(inner, depth + 1)
        return ""


def gguf_header(path: Path) -> Header:
    """Names, types and values' shapes; raises CheckpointError for files that are cut, damaged or of unknown types."""
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file; give the checkpoint's file")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path}: does not start as a GGUF file does; {AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parsed(_Cursor(path, data, 4), Stamp.of(os.fstat(file.fileno())))


def _parsed(cursor: _Cursor, stamp: Stamp) -> Header:
    path = cursor.path
    version = int(cursor.value("<I"))
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; known: 2, 3 (little-endian)")
    tensor_count, entry_count = cursor.count(24), cursor.count(12)
    metadata = {}
    for _ in range(entry_count):
        if (key := cursor.text()) in metadata:
            raise CheckpointError(f"{path}: damaged: the GGUF entry '{key[:100]}' is listed twice; {AGAIN}")
        metadata[key] = cursor.entry()
    raw: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), int(cursor.value("<I"))
        if dimensions > MAX_AXES:
            raise CheckpointError(f"{path}: damaged: tensor '{name[:100]}' has {dimensions} axes; {AGAIN}")
        shape = tuple(int(cursor.value("<Q")) for _ in range(dimensions))[::-1]  # GGML counts axes from the innermost
        check_tensor(path, name, shape)
        raw.append((name, shape, int(cursor.value("<I")), int(cursor.value("<Q"))))
    alignment = metadata.get("general.alignment", "32")
    if not re.fullmatch("[0-9]{1,7}", alignment) or not 0 < int(alignment) <= 2**20:
        raise CheckpointError(f"{path}: damaged: GGUF alignment {alignment[:40]!r}; {AGAIN}")
    start = -(-cursor.at // int(alignment)) * int(alignment)
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in raw:
        if name in tensors:
            raise CheckpointError(f"{path}: damaged: tensor '{name}' is listed twice; {AGAIN}")
        tensors[name] = _tensor_info(cursor, name, shape, kind, start + offset)
        if wanted := metadata.get(ORIGINAL_SHAPE + name):
            tensors[name] = _reshaped(path, name, tensors[name], wanted)
    _require_apart(path, tensors)
    return Header(path, tensors, metadata, "gguf", {path: stamp})


def _require_apart(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError for tensors that share bytes: a small file could then hold any number of large ones."""
    ends, before = 0, ""
    for (start, size), name in sorted((info.span or (0, 0), name) for name, info in tensors.items()):
        if size and start < ends:
            raise CheckpointError(f"{path}: damaged: tensors '{before}' and '{name}' share bytes; {AGAIN}")
        if size:
            ends, before = start + size, name


def _tensor_info(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
    path = cursor.path
    if kind in PLAIN:
        dtype, encoding, size = PLAIN[kind], "", prod(shape) * PLAIN[kind].itemsize
    elif kind in BLOCKS:
        encoding, values, block_bytes = BLOCKS[kind]
        if not shape or shape[-1] % values:
            raise CheckpointError(
                f"{path}: damaged: tensor '{name}' {list(shape)} is no whole number of {encoding}'s blocks of {values}"
            )
        dtype, size = torch.uint8, prod(shape) // values * block_bytes
    else:
        known = ", ".join(["F32, F16, BF16", *(entry[0] for entry in BLOCKS.values())])
        raise CheckpointError(
            f"{path}: tensor '{name}' has GGML type {kind}, which is not supported; known: {known}. "
            "Use a file of one of these types"
        )
    if start + size > len(cursor.data):
        raise CheckpointError(
            f"{path}: truncated: tensor '{name}' ends at byte {start + size}, the file has {len(cursor.data)}; {AGAIN}"
        )
    return TensorInfo(dtype, shape, path, encoding=encoding, span=(start, size))


def _reshaped(path: Path, name: str, info: TensorInfo, wanted: str) -> TensorInfo:
    fits = re.fullmatch(r"[0-9]{1,15}( [0-9]{1,15}){0,7}", wanted)
    shape = tuple(map(int, wanted.split())) if fits else ()
    if prod(shape) != prod(info.shape) or min(shape, default=0) < 1:
        raise CheckpointError(
            f"{path}: damaged: tensor '{name}' {list(info.shape)} cannot have the shape '{wanted[:100]}'; {AGAIN}"
        )
    return TensorInfo(info.dtype, shape, path, encoding=info.encoding, span=info.span)
