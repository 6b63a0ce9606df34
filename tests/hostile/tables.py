"""A checkpoint as a plain table of tensors, and its bytes as each kind of file, written without checking anything."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightx2v.checkpoint import DTYPES
from lightx2v.checkpoint.gguf import BLOCKS, PLAIN

NAMES = {dtype: name for name, dtype in DTYPES.items()}
GGML = {NAMES[dtype]: number for number, dtype in PLAIN.items()} | {entry[0]: n for n, entry in BLOCKS.items()}
ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """One tensor. kind: a dtype of safetensors, or a block type of GGML. raw: its bytes, as many as there may be."""

    name: str
    kind: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class Table:
    """Tensors in the order of the file; a name may stand twice."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Table:
        entries = (Entry(name, NAMES[t.dtype], tuple(t.shape), _raw(t)) for name, t in state.items())
        return Table(tuple(entries), metadata or {})


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors_header(table: Table) -> list[tuple[str, Any]]:
    """(key, value) pairs, so that a key may stand twice."""
    pairs: list[tuple[str, Any]] = [("__metadata__", dict(table.metadata))] if table.metadata else []
    offset = 0
    for entry in table.entries:
        span = [offset, offset + len(entry.raw)]
        pairs.append((entry.name, {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": span}))
        offset += len(entry.raw)
    return pairs


def safetensors(header: bytes, table: Table) -> bytes:
    return len(header).to_bytes(8, "little") + header + b"".join(entry.raw for entry in table.entries)


def object_text(pairs: Sequence[tuple[str, Any]]) -> str:
    return "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"


def gguf(table: Table, version: int = 3, offsets: Mapping[str, int] | None = None) -> bytes:
    """offsets: of tensors that are not to lie where they would."""
    metadata = {"general.architecture": "wan", **table.metadata}
    out = [b"GGUF", struct.pack("<IQQ", version, len(table.entries), len(metadata))]
    for key, value in metadata.items():
        out += [_text(key), _value(value)]
    place = 0
    for entry in table.entries:
        out += [_text(entry.name), struct.pack("<I", len(entry.shape))]
        out += [struct.pack("<Q", size % 2**64) for size in reversed(entry.shape)]
        at = (offsets or {}).get(entry.name, place)
        out.append(struct.pack("<IQ", GGML.get(entry.kind, 99), at % 2**64))
        place += _padded(len(entry.raw))
    head = b"".join(out)
    data = b"".join(entry.raw.ljust(_padded(len(entry.raw)), b"\0") for entry in table.entries)
    return head.ljust(_padded(len(head)), b"\0") + data


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bytes):  # already written
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<II", 4, value)


def tensors(table: Table) -> dict[str, Tensor]:
    """What PyTorch's files hold; tensors whose bytes do not fit their shape stay flat."""
    made = {}
    for entry in table.entries:
        flat = torch.frombuffer(bytearray(entry.raw or b"\0" * 8), dtype=torch.uint8)
        dtype = DTYPES.get(entry.kind, torch.uint8)
        whole = flat[: len(flat) // dtype.itemsize * dtype.itemsize].clone().view(dtype)
        try:
            made[entry.name] = whole[: len(entry.raw) // dtype.itemsize].view(entry.shape)
        except (RuntimeError, TypeError):  # of shapes that no tensor can have
            made[entry.name] = whole
    return made


def pth(table: Table) -> bytes:
    file = io.BytesIO()
    torch.save(tensors(table), file)
    return file.getvalue()
