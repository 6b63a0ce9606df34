"""The header of any kind of checkpoint, and its tensors one at a time."""

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightx2v.checkpoint import gguf, pickled
from lightx2v.checkpoint.folder import INDEX, SHARD, folder_header, index_of, indexed_header, shards_header
from lightx2v.checkpoint.header import CheckpointError, Header, Stamp, TensorInfo
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
    header: Header,
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    *,
    passing: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, tensor) file by file, so that one tensor at a time is resident.

    Plain tensors come as they are stored, a .pth's mapped on the CPU. Packed ones come restored to float32, computed on
    `device`. passing: a plain one may be overwritten once the next is asked for, which saves the system the clearing of
    new pages for every tensor that is copied on anyway.
    Raises CheckpointError for a file that is gone, too short, or another one than when the header was read.
    """
    wanted: dict[Path, list[str]] = {}
    for name in header.tensors if names is None else names:
        if name not in header.tensors:
            raise CheckpointError(f"{header.path}: has no tensor '{name}'")
        wanted.setdefault(header.tensors[name].file, []).append(name)
    with ExitStack() as stack:
        files = _Files(header, stack)
        for file, members in wanted.items():
            for name in members:
                info = header.tensors[name]
                if info.packed is None:
                    yield name, files.tensor(name, info, passing)
                else:
                    parts = {role: files.tensor(name, part).to(device) for role, part in info.packed.parts.items()}
                    _require_finite(info.file, name, parts.get("scale"))
                    yield name, info.packed.unpack(parts)
            _require_same(header, file)  # also at the end: it may have been written to meanwhile


def _require_finite(file: Path, name: str, scale: Tensor | None) -> None:
    """A NaN among the scales makes a row of NaN, which would only show after the first step."""
    if scale is not None and not bool(scale.isfinite().all()):
        raise CheckpointError(f"{file}: the scale of '{name}' is NaN or infinite; download the file again")


def read_into(header: Header, name: str, target: Tensor) -> None:
    """Read one tensor into contiguous main memory of its shape, and of the type that it is to have there.

    One that lies in the file as it is wanted is read past every other copy. Raises as `read_tensors` does.
    """
    info = header.tensors[name]
    if info.span is None or info.packed is not None or info.dtype != target.dtype or info.span[1] != target.nbytes:
        ((_, tensor),) = read_tensors(header, [name], target.device)
        target.copy_(tensor)
        return
    with ExitStack() as stack:
        _Files(header, stack).fill(name, info, info.span, target)


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
    """The files of one pass, each opened at its first tensor and closed with the stack.

    They are read, not mapped: where a mapped file is cut while it is looked at, the system ends the process.
    """

    def __init__(self, header: Header, stack: ExitStack) -> None:
        self._header, self._stack = header, stack
        self._open: dict[Path, BinaryIO] = {}
        self._pickled: dict[Path, Mapping[str, Tensor]] = {}
        self._passing = torch.empty(0, dtype=torch.uint8)

    def tensor(self, name: str, info: TensorInfo, passing: bool = False) -> Tensor:
        """As stored, on the CPU; `name` is the file's where the info has no other. Of a block type all bytes."""
        if info.span is None:
            whole = self._unpickled(info.file)[info.stored or name]
            return whole[slice(*info.rows)] if info.rows else whole
        memory = self._memory(info.span[1], passing)
        self.fill(name, info, info.span, memory)
        return memory.view(info.dtype) if info.encoding else memory.view(info.dtype).view(info.shape)

    def _memory(self, nbytes: int, passing: bool) -> Tensor:
        if not passing:
            return torch.empty(nbytes, dtype=torch.uint8)
        if self._passing.numel() < nbytes:
            self._passing = torch.empty(nbytes, dtype=torch.uint8)
        return self._passing[:nbytes]

    def fill(self, name: str, info: TensorInfo, span: tuple[int, int], target: Tensor) -> None:
        """Read a span of the file into contiguous main memory of as many bytes."""
        if info.file not in self._open:
            self._open[info.file] = self._opened(info.file)
        file, (start, nbytes) = self._open[info.file], span
        memory = memoryview((ctypes.c_char * nbytes).from_address(target.data_ptr())).cast("B")
        try:
            file.seek(start)
            while memory:
                count = file.readinto(memory)  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(f"{info.file}: ends within '{name}'; download the file again")
                memory = memory[count:]
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error}); check the disk that it is on") from error

    def _opened(self, path: Path) -> BinaryIO:
        _require_same(self._header, path)
        try:
            return self._stack.enter_context(path.open("rb", buffering=0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error}); check its permissions") from error

    def _unpickled(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._pickled:
            _require_same(self._header, path)
            self._pickled[path] = pickled.open_pickle(path)
        return self._pickled[path]


def _require_same(header: Header, path: Path) -> None:
    """CheckpointError where a file of the checkpoint is not the one that the header was read from."""
    try:
        now = Stamp.of(os.stat(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is gone since the model was loaded; put it back, or load again") from error
    if now != header.stamps[path]:
        raise CheckpointError(f"{path}: has changed since the model was loaded; load it again")
