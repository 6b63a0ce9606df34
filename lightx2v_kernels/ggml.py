"""GGML's block types in PyTorch: bytes to values, on whatever device the bytes are.

A block is a few scales and some packed integers. Source of every layout: ggml-org/ggml, src/ggml-common.h (the structs)
and src/ggml-quants.c (dequantize_row_*). Each function takes blocks (N, bytes) uint8 and gives values (N, values)
float32; `restore` does that for a whole tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The sixteen values of IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CHUNK = 1 << 16  # blocks restored at once: 16.8 M values of a K type, so that integers in between stay small


def restore(raw: Tensor, encoding: str, shape: tuple[int, ...]) -> Tensor:
    """All bytes of a tensor (n,) uint8, in blocks of GGML's type `encoding` -> its values (*shape), float32."""
    block_bytes, unpack = TYPES[encoding]
    blocks = raw.view(-1, block_bytes)
    return torch.cat([unpack(part) for part in blocks.split(CHUNK)]).view(shape)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block -> (N, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """codes (N, n) -> (N, 2n): of every `run` bytes first all low halves, then all high ones."""
    runs = codes.unflatten(1, (-1, 1, run))
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def _bits(codes: Tensor, width: int, count: int) -> Tensor:
    """codes (N, n) -> (N, count, n): the lowest `width` bits of every byte, then the next ones."""
    shifts = torch.arange(0, width * count, width, device=codes.device, dtype=torch.uint8)
    return codes.unsqueeze(1) >> shifts.view(1, -1, 1) & (1 << width) - 1


def _grouped(values: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """values (N, v) times scale (N, g) minus minimum (N, g), one for each of g equal groups."""
    groups = values.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)
    return (groups if minimum is None else groups - minimum.unsqueeze(2)).flatten(1)


def q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:], 16).float() - 8) * _half(blocks, 0)


def q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:], 16).float() * _half(blocks, 0) + _half(blocks, 2)


def _fifth_bits(high: Tensor) -> Tensor:
    """high (N, 4): 32 bits, the lowest first -> (N, 32), each as 16 or 0."""
    return _bits(high, 1, 8).transpose(1, 2).flatten(1) << 4


def q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return (codes.float() - 16) * _half(blocks, 0)


def q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes.float() * _half(blocks, 0) + _half(blocks, 2)


def q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _pairs(codes: Tensor) -> Tensor:
    """codes (N, 64), 2 bits each -> (N, 256): of every 32 bytes the lowest pairs, then the next ones."""
    return torch.cat([_bits(half, 2, 4).flatten(1) for half in codes.split(32, dim=1)], dim=1)


def q2_k(blocks: Tensor) -> Tensor:
    """16 bytes of scale (low half) and minimum (high half), 64 of codes, d, dmin."""
    scales, codes = blocks[:, :16], blocks[:, 16:80]
    return _grouped(_pairs(codes), _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float())


def q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of high bits (a bit clear takes 4 off), 64 of low pairs, 12 of 6-bit scales, d."""
    high = _bits(blocks[:, :32], 1, 8).flatten(1)
    codes = _pairs(blocks[:, 32:96]).to(torch.int8) - (4 - (high << 2).to(torch.int8))
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | _bits(packed[:, 8:], 2, 4).flatten(1) << 4
    return _grouped(codes, _half(blocks, 108) * (scales.float() - 32))


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """packed (N, 12) -> 8 scales and 8 minima of 6 bits (N, 8): four whole, four with their top bits in the others."""
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return scales.float(), minima.float()


def q4_k(blocks: Tensor) -> Tensor:
    """d, dmin, 12 bytes of scales and minima, 128 of codes."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return _grouped(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def q5_k(blocks: Tensor) -> Tensor:
    """d, dmin, 12 bytes of scales and minima, 32 of fifth bits, 128 of codes."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 1, 8).flatten(1) << 4
    return _grouped(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of low halves, 64 of upper pairs, 16 signed scales, d."""
    codes = _nibbles(blocks[:, :128], 64) | _pairs(blocks[:, 128:192]) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(codes.to(torch.int8) - 32, _half(blocks, 208) * scales)


def _iq4(codes: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[_nibbles(codes, 16).long()]


def iq4_nl(blocks: Tensor) -> Tensor:
    return _iq4(blocks[:, 2:]) * _half(blocks, 0)


def iq4_xs(blocks: Tensor) -> Tensor:
    """d, 2 bytes of the scales' top pairs, 4 of their low halves, 128 of codes."""
    top = _bits(blocks[:, 2:4], 2, 4).transpose(1, 2).flatten(1)
    low = _bits(blocks[:, 4:8], 4, 2).transpose(1, 2).flatten(1)
    return _grouped(_iq4(blocks[:, 8:]), _half(blocks, 0) * ((low | top << 4).float() - 32))


def quantise_q8_0(weight: Tensor) -> Tensor:
    """weight (N, K), K a multiple of 32 -> its blocks (bytes,) uint8: what examples and benchmarks are made of.

    Source: ggml-org/ggml, src/ggml-quants.c, quantize_row_q8_0_ref: scale amax / 127, rounding to nearest.
    """
    groups = weight.float().reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, groups / scale, 0.0).round().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=1).flatten()


# Name -> bytes of a block, how it is unpacked.
TYPES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (18, q4_0),
    "Q4_1": (20, q4_1),
    "Q5_0": (22, q5_0),
    "Q5_1": (24, q5_1),
    "Q8_0": (34, q8_0),
    "Q2_K": (84, q2_k),
    "Q3_K": (110, q3_k),
    "Q4_K": (144, q4_k),
    "Q5_K": (176, q5_k),
    "Q6_K": (210, q6_k),
    "IQ4_NL": (18, iq4_nl),
    "IQ4_XS": (136, iq4_xs),
}
