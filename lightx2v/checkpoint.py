"""Checkpoint files: reading headers without weights, and streaming weights into a model built on the meta device.

A *header* is what a file says about itself: tensor names, shapes, dtypes and free-form metadata. Everything that can
be known about a checkpoint is decided from it, so that a wrong, truncated or incomplete file is refused in
milliseconds and before any weight is read.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

DtypeRule = torch.dtype | None | Callable[[str], torch.dtype | None]

# Names of the safetensors format (huggingface/safetensors, "dtype" field).
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<total>\d{5})\.safetensors$")
PICKLES = (".pth", ".pt", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what was expected and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes of one checkpoint, which may be several files."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    prefix: str = ""  # stripped from the names in `tensors`; the files still carry it

    def shape(self, name: str) -> tuple[int, ...] | None:
        info = self.tensors.get(name)
        return info.shape if info else None

    def without_prefix(self, *prefixes: str) -> "Header":
        """The same header with the first prefix that every tensor carries removed from the names."""
        for prefix in prefixes:
            if self.tensors and all(name.startswith(prefix) for name in self.tensors):
                names = {name.removeprefix(prefix): info for name, info in self.tensors.items()}
                return replace(self, tensors=names, prefix=self.prefix + prefix)
        return self


def read_header(path: str | Path) -> Header:
    """Read what a checkpoint says about itself.

    path: a .safetensors file, any shard of a sharded set, an .index.json, a folder that holds one checkpoint, or a
    PyTorch .pth/.pt file of plain tensors. Safetensors weights are never touched; .pth storages are mapped, not read.
    Raises CheckpointError for missing, truncated, incomplete and foreign files.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check the path or download the checkpoint")
    if path.is_dir():
        return _folder_header(path)
    if path.name.endswith(".index.json"):
        return _indexed_header(path)
    if path.suffix == ".safetensors":
        shard = SHARD.match(path.name)
        return _shards_header(path, shard) if shard else _merged(path, [_safetensors_header(path)])
    if path.suffix in PICKLES:
        return _pickle_header(path)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: GGUF checkpoints are not supported yet; use a .safetensors file")
    raise CheckpointError(f"{path}: not a checkpoint; expected .safetensors, .pth, .pt or a folder of .safetensors")


def _safetensors_header(path: Path) -> Header:
    size = path.stat().st_size
    again = "download the file again"
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2 or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: does not start with a safetensors header ({size} bytes); {again}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: the header alone needs {8 + length} bytes, has {size}; {again}")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        tensors, end = {}, 0
        for name, entry in entries.items():
            tensors[name], stop = _tensor_info(path, name, entry)
            end = max(end, stop)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error}); {again}") from error
    expected = 8 + length + end
    if size != expected:
        word = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path}: {word}: the header describes {expected} bytes, the file has {size}; {again}")
    return Header(path, tensors, metadata)


def _tensor_info(path: Path, name: str, entry: dict) -> tuple[TensorInfo, int]:
    kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {kind}, which is not supported; known: {known}")
    if any(not isinstance(n, int) or n < 0 for n in (*shape, start, stop)):
        raise CheckpointError(f"{path}: tensor '{name}' has impossible shape {shape} or offsets {start}..{stop}")
    needed = prod(shape) * DTYPES[kind].itemsize
    if stop - start != needed:
        raise CheckpointError(f"{path}: tensor '{name}' {kind}{list(shape)} needs {needed} bytes, has {stop - start}")
    return TensorInfo(DTYPES[kind], shape, path), stop


def _merged(path: Path, parts: Iterable[Header]) -> Header:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor '{name}' is in both {tensors[name].file.name} and {info.file.name}"
                )
            tensors[name] = info
        metadata.update(part.metadata)
    return Header(path, tensors, metadata)


def _folder_header(folder: Path) -> Header:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return replace(_indexed_header(indices[0]), path=folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no .safetensors file; give the checkpoint's file or its folder")
    shard = SHARD.match(files[0].name)
    if shard and all((m := SHARD.match(f.name)) and m["stem"] == shard["stem"] for f in files):
        return replace(_shards_header(files[0], shard), path=folder)
    if len(files) > 1 or len(indices) > 1:
        names = ", ".join(f.name for f in files)
        raise CheckpointError(f"{folder}: holds several checkpoints ({names}); give the path of one file")
    return replace(_safetensors_header(files[0]), path=folder)


def _indexed_header(index: Path) -> Header:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download the file again") from error
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: names a file outside its own folder; download the index again")
    _require_files(index, [index.parent / name for name in names])
    header = _merged(index, (_safetensors_header(index.parent / name) for name in names))
    if lost := sorted(set(weight_map) - set(header.tensors)):
        raise CheckpointError(
            f"{index}: {len(lost)} tensors are not in its files, first '{lost[0]}'; download it again"
        )
    return header


def _shards_header(path: Path, shard: re.Match[str]) -> Header:
    total = int(shard["total"])
    files = [path.parent / f"{shard['stem']}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    _require_files(path, files)
    return _merged(path, (_safetensors_header(file) for file in files))


def _require_files(path: Path, files: list[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} shards are missing from {path.parent}: {', '.join(missing)}; "
            "download them into the same folder"
        )


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors alike; all mean the same to the user
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file of plain tensors ({type(error).__name__}); "
            "it is damaged or holds code: use the .safetensors version"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds something other than a dictionary of tensors")
    return state


def _pickle_header(path: Path) -> Header:
    state = _open_pickle(path)
    return Header(path, {k: TensorInfo(v.dtype, tuple(v.shape), path) for k, v in state.items()}, {})


def read_tensors(header: Header, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, CPU tensor) file by file; safetensors are mapped, so one tensor at a time is resident."""
    wanted: dict[Path, list[str]] = {}
    for name in header.tensors if names is None else names:
        if name not in header.tensors:
            raise CheckpointError(f"{header.path}: has no tensor '{name}'")
        wanted.setdefault(header.tensors[name].file, []).append(name)
    for file, members in wanted.items():
        if file.suffix in PICKLES:
            state = _open_pickle(file)
            for name in members:
                yield name, state[header.prefix + name]
        else:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for name in members:
                    yield name, handle.get_tensor(header.prefix + name)


def assign(
    module: nn.Module,
    header: Header,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    dtype: DtypeRule = None,
    device: torch.device | str = "cpu",
) -> None:
    """Give every parameter and persistent buffer of a meta-device module its weights.

    rename: checkpoint name -> module name, or None to leave a tensor of the file unused.
    dtype: of floating-point weights; None keeps the file's; a function decides per module name.
    Raises CheckpointError for tensors that are missing, unexpected or of another shape, before any weight is read.
    """
    targets = {target: name for name in header.tensors if (target := rename(name)) is not None}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_names(header, expected, set(targets))
    for target, name in targets.items():
        if header.tensors[name].shape != expected[target]:
            raise CheckpointError(
                f"{header.path}: tensor '{name}' is {list(header.tensors[name].shape)}, "
                f"the model expects {list(expected[target])}; this is a checkpoint of another model"
            )
    origin = {name: target for target, name in targets.items()}
    for name, tensor in read_tensors(header, list(origin)):
        target = origin[name]
        wanted = dtype(target) if callable(dtype) else dtype
        if not tensor.is_floating_point():
            wanted = None
        # clone: a mapped tensor would keep its file open and mapped for the life of the model
        tensor = tensor.to(device=device, dtype=wanted, copy=True)
        _put(module, target, tensor)


def _check_names(header: Header, expected: Mapping[str, tuple[int, ...]], found: set[str]) -> None:
    missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
    if missing:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {len(expected)} tensors are missing, first '{missing[0]}'; "
            "the file is incomplete or of another model"
        )
    if extra:
        raise CheckpointError(
            f"{header.path}: {len(extra)} tensors have no place in the model, first '{extra[0]}'; "
            "the file is of another model or in a layout that is not supported yet"
        )


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
