"""One .safetensors file: its header, checked against its length."""

import os
from math import prod
from pathlib import Path
from typing import Any

from lightx2v import strict_json
from lightx2v.checkpoint.header import DTYPES, CheckpointError, Header, Stamp, TensorInfo, check_tensor

# The format's own limit is 100 MB, which can become 2 GB of empty lists in memory. Wan2.1 14B's header has 113 kB.
MAX_HEADER_BYTES = 16 << 20


def safetensors_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is truncated, damaged or something else."""
    again = "download the file again"
    if not path.is_file():  # a pipe or a device would be waited for, or read without end
        raise CheckpointError(f"{path}: not a file; give the checkpoint's file or its folder")
    with path.open("rb") as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        size = stamp.size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2 or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: does not start with a safetensors header ({size} bytes); {again}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: the header alone needs {8 + length} bytes, has {size}; {again}")
        raw = file.read(length)
    try:
        entries = strict_json.parse(raw)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("its __metadata__ is not a table of texts")
        tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error}); {again}") from error
    end = _end_of_data(path, tensors, 8 + length)
    if size != end:
        word = "truncated" if size < end else "damaged"
        raise CheckpointError(f"{path}: {word}: the header describes {end} bytes, the file has {size}; {again}")
    return Header(path, tensors, metadata, stamps={path: stamp})


def _end_of_data(path: Path, tensors: dict[str, TensorInfo], start: int) -> int:
    """The byte after the last tensor; the format wants them one after another, from byte `start`."""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].span or (0, 0)):
        first, size = info.span or (0, 0)
        if first != start:
            raise CheckpointError(
                f"{path}: damaged: tensor '{name}' begins at byte {first}, the one before it ends at {start}; "
                "download the file again"
            )
        start += size
    return start


def _tensor_info(path: Path, name: str, entry: dict[str, Any], data: int) -> TensorInfo:
    """data: the byte of the file from which the entry's offsets count."""
    kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    check_tensor(path, name, shape)
    if kind not in DTYPES:
        known, found = ", ".join(DTYPES), str(kind)[:40]
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {found}, which is not supported; known: {known}")
    if any(type(n) is not int or n < 0 for n in (start, stop)):
        at = f"{str(start)[:40]}..{str(stop)[:40]}"
        raise CheckpointError(f"{path}: tensor '{name}' has impossible offsets {at}; download the file again")
    needed = prod(shape) * DTYPES[kind].itemsize
    if stop - start != needed:
        raise CheckpointError(f"{path}: tensor '{name}' {kind}{list(shape)} needs {needed} bytes, has {stop - start}")
    return TensorInfo(DTYPES[kind], shape, path, span=(data + start, needed))
