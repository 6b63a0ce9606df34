"""What is known of a checkpoint before its weights are read."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.messages import readable

# Names of the safetensors format (huggingface/safetensors, "dtype" field).
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),  # since PyTorch 2.7
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


MAX_AXES = 8
MAX_NAME = 500  # characters; published names have up to 100
MAX_BLOCKS = 200  # of a network; the deepest here has 54
AGAIN = "download the file again"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what was expected and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


def check_tensor(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError for a name or a shape that no file of weights has.

    So whatever is computed from a shape later stays in proportion to the file, and names can be printed.
    """
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: damaged: a tensor is named {name[:100]!a}; {AGAIN}")
    whole = all(type(size) is int and 0 <= size < 2**48 for size in shape[: MAX_AXES + 1])
    if len(shape) > MAX_AXES or not whole or (len(shape) > 1 and 0 in shape):
        shown = f"{', '.join(str(size)[:40] for size in shape[:MAX_AXES])}{', ...' if len(shape) > MAX_AXES else ''}"
        raise CheckpointError(f"{path}: damaged: tensor '{name}' has the impossible shape [{shown}]; {AGAIN}")


def block_numbers(path: Path, names: Iterable[str], pattern: re.Pattern[str]) -> set[int]:
    """The numbers that the first group of `pattern` finds at the start of names.

    Raises CheckpointError for more blocks than a network has: it would be built before anything is missed.
    """
    texts = {match[1] for name in names if (match := pattern.match(name))}
    if long := next((text for text in texts if len(text) > 9 or int(text) >= MAX_BLOCKS), None):
        raise CheckpointError(f"{path}: damaged: it names a block {long[:40]}, networks have some 40; {AGAIN}")
    return set(map(int, texts))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    dtype: as it is stored; uint8 where `encoding` names one of GGML's block types.
    shape: of the values, however they are packed.
    stored: its name in the file; empty where it goes by that name.
    span: first byte and number of bytes in the file; None in a .pth.
    rows: which rows of the stored tensor these are, first and end; None for all of them.
    packed: how the values are restored, where the tensor alone is not they.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    stored: str = ""
    encoding: str = ""
    span: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None
    packed: "Packed | None" = None

    @property
    def nbytes(self) -> int:
        return self.span[1] if self.span else prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, order=True)
class Stamp:
    """A file as it was when its header was read: bytes, and the time of its last change in ns."""

    size: int
    modified: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Stamp":
        return cls(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Packed:
    """A weight that is stored in fewer bits, or in several pieces.

    scheme: "fp8", "int8", "nvfp4", "mxfp8" or "gguf"; detail: what it says beside, e.g. "e4m3, a scale a tensor".
        Both are empty where plain values only lie in several tensors.
    parts: role -> tensor of the file; "weight" always, "scale" where there is one, or what the scheme calls them.
    unpack: the parts as they are stored -> the values, float32, in the shape of the weight.
    """

    scheme: str
    detail: str
    parts: Mapping[str, TensorInfo]
    unpack: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes of one checkpoint, which may be several files.

    container: "single", "sharded", "block-split", "pickle" or "gguf".
    stamps: what tells each of its files from another one that is put in its place.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    container: str = "single"
    stamps: Mapping[Path, "Stamp"] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...] | None:
        info = self.tensors.get(name)
        return info.shape if info else None

    @property
    def nbytes(self) -> int:
        """Of all weights as they are stored."""
        parts = (info.packed.parts.values() if info.packed else (info,) for info in self.tensors.values())
        return sum(part.nbytes for group in parts for part in group)

    def renamed(self, names: Mapping[str, str]) -> "Header":
        """The header of the tensors in `names` (name here -> new name), each still found in its file."""
        kept = ((old, new, self.tensors[old]) for old, new in names.items())
        return replace(self, tensors={new: replace(info, stored=info.stored or old) for old, new, info in kept})

    def renamed_by(self, rename: Callable[[str], str]) -> "Header":
        """The same header under other names; raises CheckpointError where two tensors would get one name."""
        owner: dict[str, str] = {}
        for theirs in self.tensors:
            if (ours := rename(theirs)) in owner:
                raise CheckpointError(
                    f"{self.path}: mixes two layouts: '{owner[ours]}' and '{theirs}' are the same weight; "
                    "use a file in the model's own or in diffusers' layout"
                )
            owner[ours] = theirs
        return self.renamed({theirs: ours for ours, theirs in owner.items()})

    def without_prefix(self, *prefixes: str) -> "Header":
        """The same header with the first prefix that every tensor carries removed from the names."""
        for prefix in prefixes:
            if self.tensors and all(name.startswith(prefix) for name in self.tensors):
                return self.renamed({name: name.removeprefix(prefix) for name in self.tensors})
        return self


def merged(path: Path, parts: Iterable[Header], container: str) -> Header:
    """One header of several files; raises CheckpointError where two of them hold the same tensor."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    stamps: dict[Path, Stamp] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor '{name}' is in both {tensors[name].file.name} and {info.file.name}; "
                    "two checkpoints lie in one folder: move one of them to a folder of its own"
                )
            tensors[name] = info
        metadata.update(part.metadata)
        stamps.update(part.stamps)
    return Header(path, tensors, metadata, container, stamps)
