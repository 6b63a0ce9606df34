"""GGUF files in GGML's type Q4_0: rounding weights to it, also while they are trained, and writing them."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 32  # values
Q4_0, FLOAT16 = 2, 1  # ggml.h, enum ggml_type
MOSTLY_Q4_0, VERSION, ALIGNMENT = 2, 3, 32  # general.file_type; ggml-org/ggml, docs/gguf.md
UINT32, INT32, STRING, ARRAY = 4, 5, 8, 9  # of metadata values


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight, a multiple of 32 values -> codes (N, 32) of 0..15, scales (N, 1) that float16 holds; (codes - 8) * scale.

    Source: ggml-org/ggml, src/ggml-quants.c, quantize_row_q4_0_ref: the value furthest from 0 becomes -8.
    """
    blocks = weight.reshape(-1, BLOCK).float()
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (furthest / -8).half().float()
    codes = torch.where(scale != 0, blocks / scale + 8.5, 8.5).floor().clamp(0, 15)
    return codes, scale


@torch.no_grad()
def round_q4_0(weights: Sequence[Tensor]) -> None:
    """Replace the weights by what Q4_0 would keep of them. Never waits for the device."""
    for dtype in {weight.dtype: None for weight in weights}:  # copies of one dtype are few and large
        alike = [weight for weight in weights if weight.dtype == dtype]
        codes, scale = codes_of(torch.cat([weight.flatten() for weight in alike]))
        values = ((codes - 8) * scale).flatten().split([weight.numel() for weight in alike])
        torch._foreach_copy_(alike, [part.view_as(w) for part, w in zip(values, alike, strict=True)])


def to_q4_0(weight: Tensor) -> bytes:
    """The blocks: a float16 scale, then 16 bytes whose low halves are the first 16 codes."""
    codes, scale = codes_of(weight)
    packed = codes.to(torch.uint8)
    nibbles = packed[:, :16] | packed[:, 16:] << 4
    return torch.cat([scale.half().view(torch.uint8), nibbles], 1).contiguous().numpy().tobytes()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _entries(architecture: str, reshaped: Mapping[str, Sequence[int]]) -> list[bytes]:
    def number(name: str, value: int) -> bytes:
        return _text(name) + struct.pack("<II", UINT32, value)

    entries = [_text("general.architecture") + struct.pack("<I", STRING) + _text(architecture)]
    entries += [number("general.quantization_version", 2), number("general.file_type", MOSTLY_Q4_0)]
    for name, shape in reshaped.items():
        kind = struct.pack("<IIQ", ARRAY, INT32, len(shape))
        entries.append(_text(f"comfy.gguf.orig_shape.{name}") + kind + struct.pack(f"<{len(shape)}i", *shape))
    return entries


def write_gguf(weights: Mapping[str, Tensor], path: Path, architecture: str, quantised: Sequence[str]) -> int:
    """Write the weights, those named in `quantised` as Q4_0 and the others as float16, under a temporary name, then
    rename it; returns the file's bytes. What has more than GGML's four axes is flattened, and the file tells its shape
    as ComfyUI-GGUF's do.

    Raises FloatingPointError for values beyond float16.
    """
    packed: dict[str, tuple[tuple[int, ...], int, bytes]] = {}
    for name, value in weights.items():
        weight = value.detach().float().cpu()
        if not weight.half().isfinite().all():
            raise FloatingPointError(f"{path.name}: '{name}' does not fit float16")
        if name in quantised:
            packed[name] = (tuple(weight.shape), Q4_0, to_q4_0(weight))
        else:
            shape = tuple(weight.flatten(0, -4).shape if weight.ndim > 4 else weight.shape)
            packed[name] = (shape, FLOAT16, weight.half().contiguous().numpy().tobytes())
    reshaped = {name: tuple(value.shape) for name, value in weights.items() if value.ndim > 4}
    entries, infos, at = _entries(architecture, reshaped), b"", 0
    for name, (shape, kind, data) in packed.items():
        infos += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]) + struct.pack("<IQ", kind, at)
        at += len(data) + -len(data) % ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", VERSION, len(packed), len(entries)) + b"".join(entries) + infos
    fresh = path.with_suffix(".tmp")
    with fresh.open("wb") as file:
        for data in (head, *(data for _, _, data in packed.values())):
            file.write(data + bytes(-len(data) % ALIGNMENT))
    os.replace(fresh, path)
    return path.stat().st_size
