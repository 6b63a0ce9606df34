"""PyTorch's own files (.pth, .pt, .ckpt) of plain tensors; code in them is never run."""

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightx2v.checkpoint.header import DTYPES, CheckpointError, Header, Stamp, TensorInfo, check_tensor

SUFFIXES = (".pth", ".pt", ".ckpt")
WRAPPERS = ("state_dict", "model")  # keys under which trainers put the weights
USE_OTHER = "it is damaged or holds code: use the .safetensors version"
# Of the archive that such a file is. umT5 in Wan's names has 248 entries, a list of 15 kB and a pickle of 26 kB.
MAX_ENTRIES = 20_000
MAX_LIST_BYTES = 4 << 20
MAX_PICKLE_BYTES = 8 << 20
LIST_END = b"PK\x05\x06"  # APPNOTE 6.3.10, 4.3.16: the record that ends an archive, and its widest comment
WIDE_END, LOCATOR = b"PK\x06\x06", b"PK\x06\x07"  # 4.3.14, 4.3.15
LIST_END_BYTES, MAX_COMMENT = 22, 65_535


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, their storages mapped and not read.

    Raises CheckpointError for anything else: a damaged archive, one that would grow when it is unpacked, code, and
    tensors that are sparse, quantised by PyTorch, or larger than what the file holds of them.
    """
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises pickle, zip and runtime errors alike; all mean the same to the user
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file of plain tensors ({type(error).__name__}); {USE_OTHER}"
        ) from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds something other than a dictionary of tensors")
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
    return state


def pickle_header(path: Path) -> Header:
    stamp = Stamp.of(path.stat())
    tensors = {name: TensorInfo(t.dtype, tuple(t.shape), path) for name, t in open_pickle(path).items()}
    return Header(path, tensors, {}, "pickle", {path: stamp})


def _check_archive(path: Path) -> None:
    """Raise CheckpointError, or what zipfile raises, before anything is unpacked.

    PyTorch stores entries as they are, so an entry that is packed, or entries that are together larger than the file,
    are a zip bomb.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file; give the checkpoint's file")
    size = path.stat().st_size
    with path.open("rb") as file:
        if (listed := _list_bytes(file, size)) > MAX_LIST_BYTES:
            raise CheckpointError(f"{path}: its list of entries has {listed:,} bytes; {USE_OTHER}")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES or unpacked > size:
        raise CheckpointError(
            f"{path}: {len(entries):,} entries of {unpacked:,} bytes in a file of {size:,}; {USE_OTHER}"
        )
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{path}: holds code (TorchScript): use the .safetensors version")
    for entry in entries:
        packed = entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
        long = not entry.filename.rpartition("/")[0].endswith("/data") and entry.file_size > MAX_PICKLE_BYTES
        if packed or long:
            how = "packed" if packed else f"{entry.file_size:,} bytes long"
            raise CheckpointError(f"{path}: its entry '{entry.filename[:100]}' is {how}; {USE_OTHER}")


def _list_bytes(file: BinaryIO, size: int) -> int:
    """Bytes of an archive's list of entries, which zipfile reads whole, or 0 where there is none.

    It lies between the entries and the record that ends the file; one that says it is longer than all of that is caught
    by zipfile itself.
    """
    tail = min(size, LIST_END_BYTES + MAX_COMMENT)
    file.seek(size - tail)
    raw = file.read(tail)
    at = raw.rfind(LIST_END)
    if at < 0:
        return 0
    if len(raw) - at < LIST_END_BYTES:
        return size
    (listed,) = struct.unpack_from("<I", raw, at + 12)
    # Of an archive that may be larger than 4 GB, a record of 56 bytes with the true size at byte 40 and a locator of 20
    # stand before this one; zipfile reads them wherever they stand.
    file.seek(max(0, size - tail + at - 76))
    wide = file.read(76)
    if wide[56:60] == LOCATOR and len(wide) == 76:
        return int(struct.unpack_from("<Q", wide, 40)[0]) if wide[:4] == WIDE_END else size
    return size if listed == 0xFFFFFFFF else int(listed)


def _check_tensor(path: Path, name: object, tensor: Tensor) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: holds a tensor under {ascii(name)[:100]}, which is no name; {USE_OTHER}")
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{path}: '{name[:100]}' is no plain tensor ({tensor.dtype}, {tensor.layout}, {tensor.device}); {USE_OTHER}"
        )
    check_tensor(path, name, tuple(tensor.shape))
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.itemsize > held:  # rows that are one row, again and again
        raise CheckpointError(f"{path}: '{name}' {list(tensor.shape)} is {held} bytes in the file; {USE_OTHER}")
