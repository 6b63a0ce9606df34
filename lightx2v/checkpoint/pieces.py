"""Layers that a file fuses or keeps apart where the model does not: rows cut out of a tensor, tensors put together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightx2v.checkpoint.header import AGAIN, CheckpointError, Header, Packed, TensorInfo

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT = "weight"


def split(header: Header, owner: str, parts: Sequence[str]) -> Header:
    """The same header with the layer `owner` as several, each with as many of its rows, from the top.

    What has a value a row (weight, bias, a scale a row) is cut; what speaks of the whole layer (a scale, a mark) is
    each part's. Raises CheckpointError where the rows cannot be shared out evenly.
    """
    rows = (header.tensors[f"{owner}.{WEIGHT}"].shape or (0,))[0]
    if not rows or rows % len(parts):
        raise CheckpointError(f"{header.path}: '{owner}' has {rows} rows, not {len(parts)} layers of one size")
    size = rows // len(parts)
    tensors: dict[str, TensorInfo] = {}
    for name, info in header.tensors.items():
        place, _, leaf = name.rpartition(".")
        if place != owner:
            tensors[name] = info
            continue
        info = replace(info, stored=info.stored or name)
        for i, part in enumerate(parts):
            whole = info.shape[:1] != (rows,)
            tensors[f"{part}.{leaf}"] = info if whole else cut(info, i * size, (i + 1) * size)
    return replace(header, tensors=tensors)


def join(header: Header, owners: Sequence[str], whole: str) -> Header:
    """The same header with the layers `owners` as one, their rows from the top in this order.

    Raises CheckpointError for quantised ones, whose scales would have to be put together too.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, info in header.tensors.items():
        place, _, leaf = name.rpartition(".")
        if place == owners[0]:
            tensors[f"{whole}.{leaf}"] = joined(header, [f"{owner}.{leaf}" for owner in owners])
        elif place not in owners:
            tensors[name] = info
    return replace(header, tensors=tensors)


def swapped(header: Header, owner: str) -> Header:
    """The same header with the lower half of a layer's rows above its upper half."""
    tensors = dict(header.tensors)
    for name, info in header.tensors.items():
        if name.rpartition(".")[0] == owner:
            _require_plain(header, name)
            half = info.shape[0] // 2
            if not half or info.shape[0] % 2:
                raise CheckpointError(f"{header.path}: '{name}' has {info.shape[0]} rows, expected two halves")
            stored = replace(info, stored=info.stored or name)
            tensors[name] = _stacked([cut(stored, half, info.shape[0]), cut(stored, 0, half)])
    return replace(header, tensors=tensors)


def joined(header: Header, names: Sequence[str]) -> TensorInfo:
    """One tensor with the rows of several, of one width and kind."""
    for name in names:
        if name not in header.tensors:
            raise CheckpointError(f"{header.path}: '{name}' is missing; the file is incomplete: download it again")
        _require_plain(header, name)
    first = header.tensors[names[0]]
    for name in names[1:]:
        info = header.tensors[name]
        if (info.shape[1:], info.dtype) != (first.shape[1:], first.dtype):
            raise CheckpointError(
                f"{header.path}: '{names[0]}' {list(first.shape)} and '{name}' {list(info.shape)} cannot make one "
                "layer; the file is damaged or of another model"
            )
    return _stacked([replace(header.tensors[name], stored=header.tensors[name].stored or name) for name in names])


def cut(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows start to stop of a tensor whose rows lie one after the other."""
    span = info.span
    if span is not None:
        row = span[1] // info.shape[0]
        span = (span[0] + start * row, (stop - start) * row)
    first = info.rows[0] if info.rows else 0
    return replace(info, shape=(stop - start, *info.shape[1:]), span=span, rows=(first + start, first + stop))


def _stacked(infos: Sequence[TensorInfo]) -> TensorInfo:
    parts = {str(i): info for i, info in enumerate(infos)}
    shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
    return replace(infos[0], shape=shape, span=None, rows=None, stored="", packed=Packed("", "", parts, _cat))


def _cat(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parts[str(i)] for i in range(len(parts))])


def _require_plain(header: Header, name: str) -> None:
    info = header.tensors[name]
    if not info.shape:
        raise CheckpointError(f"{header.path}: '{name}' is one number, expected rows; {AGAIN}")
    if info.encoding or info.packed is not None or info.dtype not in PLAIN:
        word = info.encoding or str(info.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{header.path}: '{name}' is {word} and is one of several tensors that make one layer, which is only known "
            "for bf16, fp16 and fp32; use one of these, or a file in the model's original layout"
        )
