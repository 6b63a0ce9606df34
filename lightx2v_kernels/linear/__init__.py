"""Linear layers whose weights stay packed: 8-bit numbers times scales, GGML's blocks, NVFP4 and MXFP8.

int8_linear and fp8_linear (values (..., K) int8 | float8_e4m3fn, scale (..., 1) fp32, weight (N, K) of the same type,
weight_scale (N,) fp32, bias (N,) | None, dtype) -> (..., N) in `dtype`:
y = (values · weight^T) · scale · weight_scale + bias, one scale a token and one a row of the weight, one rounding at
the end. K and N are multiples of 16. A weight that has one scale for all rows repeats it.
Source: Xiao et al. 2022, arXiv:2211.10438 (per-token, per-channel); Micikevicius et al. 2022, arXiv:2209.05433 (e4m3).

gguf_linear(x (..., K), blocks (bytes,) uint8, encoding, (N, K), bias (N,) | None) -> (..., N) in the dtype of x:
x · restore(blocks)^T + bias, where the blocks are GGML's (`lightx2v_kernels/ggml.py`).

nvfp4_linear(x (..., K), codes (N, K / 2) uint8, scales uint8, unit (1,) fp32, high_first, bias (N,) | None) and
mxfp8_linear(x (..., K), values (N, K) uint8, scales uint8, bias) -> (..., N) in the dtype of x: x · weight^T + bias,
where the weight is restored (`lightx2v_kernels/microscaled.py`). K is a multiple of 32, N of 16.

`dtype` is a backend's type of results. None of them has a gradient: packed numbers cannot move by small steps.
"""

from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.ggml import TYPES, quantise_q8_0
from lightx2v_kernels.linear.reference import gguf_linear, mxfp8_linear, nvfp4_linear, plain_linear, scaled_linear
from lightx2v_kernels.microscaled import quantise_mxfp8, quantise_nvfp4, tiled, unit_of
from lightx2v_kernels.quantized import LARGEST
from lightx2v_kernels.registry import Op


def _scaled(generator: torch.Generator, rows: int, size: int, packed: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random (rows, size) in 8 bits, and scales (rows,) that differ by a factor of four."""
    x = torch.randn(rows, size, generator=generator)
    full = LARGEST[packed] / x.abs().amax(1, keepdim=True)
    values = (x * full).round() if packed == torch.int8 else x * full
    return values.to(packed), (0.5 + 1.5 * torch.rand(rows, generator=generator)) / full.flatten()


def _examples(packed: torch.dtype) -> Any:
    def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
        """A batch of two with bias; one token; a long row without bias, where sums in few bits would show."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for tokens, rows, size, biased in ((66, 176, 2 * head_dim, True), (1, 96, 64, True), (40, 272, 4096, False)):
            values, scale = _scaled(generator, tokens, size, packed)
            weight, weight_scale = _scaled(generator, rows, size, packed)
            bias = torch.randn(rows, generator=generator).to(device, dtype) if biased else None
            if tokens == 66:
                values, scale = values.view(2, 33, size), scale.view(2, 33)
            scale = scale[..., None].to(device)
            found.append((values.to(device), scale, weight.to(device), weight_scale.to(device), bias, dtype))
        return tuple(found)

    return examples


def gguf_examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
    """Each type of block with the same few tokens, then one for many tokens; half the bytes are arbitrary."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for encoding, (block_bytes, _) in TYPES.items():
        rows, size = 48, 512
        count = rows * size // (32 if block_bytes <= 34 else 256)
        blocks = torch.randint(0, 256, (count, block_bytes), dtype=torch.uint8, generator=generator)
        _tame(blocks, encoding)
        x = torch.randn(2, 5, size, generator=generator).to(device, dtype)
        bias = torch.randn(rows, generator=generator).to(device, dtype)
        found.append((x, blocks.flatten().to(device), encoding, (rows, size), bias))
    weight = torch.randn(80, 256, generator=generator)
    x = torch.randn(130, 256, generator=generator).to(device, dtype)
    return (*found, (x, quantise_q8_0(weight).to(device), "Q8_0", (80, 256), None))


def _microscaled(nvfp4: bool) -> Any:
    def examples(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[tuple[Any, ...], ...]:
        """A batch of two with bias; one token and rows that fill no tile of scales; more than one tile each way."""
        generator = torch.Generator().manual_seed(0)
        found: list[tuple[Any, ...]] = []
        for shape, rows, size, biased in (
            ((2, 33), 176, 2 * head_dim, True),
            ((1,), 48, 32, True),
            ((40,), 272, 2080, False),
        ):
            x = torch.randn(*shape, size, generator=generator).to(device, dtype)
            weight = torch.randn(rows, size, generator=generator) * (0.5 + torch.rand(rows, 1, generator=generator))
            bias = torch.randn(rows, generator=generator).to(device, dtype) if biased else None
            if nvfp4:
                unit = unit_of(weight.abs().amax())
                codes, scales = quantise_nvfp4(weight, unit, biased)
                found.append((x, codes.to(device), tiled(scales).to(device), unit.to(device), biased, bias))
            else:
                values, scales = quantise_mxfp8(weight)
                found.append((x, values.to(device), tiled(scales).to(device), bias))
        return tuple(found)

    return examples


def _tame(blocks: Tensor, encoding: str) -> None:
    """Small positive scales in place of arbitrary ones, which might not be numbers."""
    small = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    for at in SCALES_AT[encoding]:
        blocks[:, at : at + 2] = small


# Where a block's float16 scales lie (ggml-common.h).
SCALES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}

OPS = (
    Op("int8_linear", scaled_linear, _examples(torch.int8), plain=plain_linear),
    Op("fp8_linear", scaled_linear, _examples(torch.float8_e4m3fn), plain=plain_linear),
    Op("gguf_linear", gguf_linear, gguf_examples),
    Op("nvfp4_linear", nvfp4_linear, _microscaled(True)),
    Op("mxfp8_linear", mxfp8_linear, _microscaled(False)),
)
