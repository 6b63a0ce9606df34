"""The header of any kind of checkpoint, and its tensors one at a time."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightx2v.checkpoint import gguf, pickled
from lightx2v.checkpoint.folder import INDEX, SHARD, folder_header, index_of, indexed_header, shards_header
from lightx2v.checkpoint.header import CheckpointError, Header, TensorInfo
from lightx2v.checkpoint.single import safetensors_header

GGUF = ".gguf"


def read_header(path: str | Path) -> Header:
    """Read what a checkpoint says about itself.

    path: a .safetensors or .gguf file, any shard of a sharded set, an .index.json, a folder that holds one checkpoint
    (shards, diffusers' transformer folder, one file a block), or a PyTorch .pth/.pt file of plain tensors.
    Weights are never touched; .pth storages are mapped, not read.
    Raises CheckpointError for missing, truncated, incomplete and foreign files.
    """
    path = Path(path)
    if not _exists(path):
        raise CheckpointError(f"{path}: no such file or folder; check the path or download the checkpoint")
    if path.is_dir():
        return folder_header(path)
    if path.name.endswith(INDEX):
        return indexed_header(path)
    if path.suffix == ".safetensors":
        if shard := SHARD.match(path.name):
            return shards_header(path, shard)
        index = index_of(path)
        return indexed_header(index) if index else safetensors_header(path)
    if path.suffix in pickled.SUFFIXES:
        return pickled.pickle_header(path)
    if path.suffix == GGUF:
        return gguf.gguf_header(path)
    raise CheckpointError(
        f"{path}: not a checkpoint; expected .safetensors, .gguf, .pth, .pt or a folder of .safetensors"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be looked for ({error.strerror}); check the path") from error


def read_tensors(
    header: Header, names: Iterable[str] | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, tensor) file by file, so that one tensor at a time is resident.

    Plain tensors come as they are stored, safetensors' and .pth's mapped on the CPU. Packed ones come restored to
    float32, computed on `device`.
    """
    wanted: dict[Path, list[str]] = {}
    for name in header.tensors if names is None else names:
        if name not in header.tensors:
            raise CheckpointError(f"{header.path}: has no tensor '{name}'")
        wanted.setdefault(header.tensors[name].file, []).append(name)
    with ExitStack() as stack:
        files = _Files(stack)
        for members in wanted.values():
            for name in members:
                info = header.tensors[name]
                if info.packed is None:
                    yield name, files.tensor(name, info)
                else:
                    parts = {role: files.tensor(name, part).to(device) for role, part in info.packed.parts.items()}
                    _require_finite(info.file, name, parts.get("scale"))
                    yield name, info.packed.unpack(parts)


def _require_finite(file: Path, name: str, scale: Tensor | None) -> None:
    """A NaN among the scales makes a row of NaN, which would only show after the first step."""
    if scale is not None and not bool(scale.isfinite().all()):
        raise CheckpointError(f"{file}: the scale of '{name}' is NaN or infinite; download the file again")


def read_into(header: Header, name: str, target: Tensor) -> None:
    """Read one tensor into contiguous main memory of its shape, and of the type that it is to have there.

    One that lies in the file as it is wanted is read past every other copy. Raises CheckpointError for a file that
    is gone or ends too early.
    """
    info = header.tensors[name]
    if info.span is None or info.packed is not None or info.dtype != target.dtype or info.span[1] != target.nbytes:
        ((_, tensor),) = read_tensors(header, [name], target.device)
        target.copy_(tensor)
        return
    start, nbytes = info.span
    memory = memoryview((ctypes.c_char * nbytes).from_address(target.data_ptr())).cast("B")
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(start)
            while memory:
                count = file.readinto(memory)
                if not count:
                    raise CheckpointError(f"{info.file}: ends within '{name}'; download the file again")
                memory = memory[count:]
    except FileNotFoundError as error:
        raise CheckpointError(f"{info.file}: is gone since the model was loaded; put it back, or load again") from error


def read_bytes(header: Header, names: Iterable[str]) -> dict[str, bytes]:
    """Small tensors as bytes, in the order of their places in the file, so that the disk need not seek for each."""
    infos = [(header.tensors[name], name) for name in names]
    infos.sort(key=lambda pair: (pair[0].file, pair[0].span or (0, 0)))
    found: dict[str, bytes] = {}
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        for info, name in infos:
            if info.span is None:
                ((_, tensor),) = read_tensors(header, [name])
                found[name] = bytes(tensor.flatten().view(torch.uint8).tolist())
                continue
            if info.file not in opened:
                opened[info.file] = stack.enter_context(info.file.open("rb"))
            opened[info.file].seek(info.span[0])
            found[name] = opened[info.file].read(info.span[1])
    return found


class _Files:
    """The files of one pass, each opened at its first tensor and closed with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, Any] = {}

    def tensor(self, name: str, info: TensorInfo) -> Tensor:
        """As stored, on the CPU; `name` is the file's where the info has no other."""
        file, stored = info.file, info.stored or name
        if file not in self._open:
            self._open[file] = self._opened(file)
        if file.suffix == GGUF:
            return gguf.read_raw(self._open[file], info)
        if file.suffix in pickled.SUFFIXES:
            whole = self._open[file][stored]
            return whole[slice(*info.rows)] if info.rows else whole
        if info.rows:
            return self._open[file].get_slice(stored)[slice(*info.rows)]
        return self._open[file].get_tensor(stored)

    def _opened(self, file: Path) -> Any:
        if file.suffix in pickled.SUFFIXES:
            return pickled.open_pickle(file)
        if file.suffix == GGUF:
            return self._stack.enter_context(file.open("rb"))
        try:
            return self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); download the file again") from error
