"""GGML's blocks in Triton: one value at a time, from wherever its bits lie in its block.

A weight is restored to a scratch tensor and cuBLAS multiplies: 0.09 ms for 13824 x 5120 values of Q8_0, whose product
takes 7 (H100, 32760 tokens). Restoring inside the product, a tile at a time, was slower at every number of tokens, even
at one: 0.12 against 0.11 ms for Q8_0, 0.51 against 0.16 for Q4_K (5120 x 5120). Layouts: `lightx2v_kernels/ggml.py`.
"""

from typing import Sequence  # noqa: UP035 (PyTorch 2.6 knows no other in a schema)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.ggml import TYPES, restore
from lightx2v_kernels.opaque import opaque

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
VALUES = 1024  # restored by one program


@triton.jit
def _byte(raw, at):
    return tl.load(raw + at).to(tl.int32)


@triton.jit
def _half(halves, at):
    return tl.load(halves + at // 2).to(tl.float32)


@triton.jit
def _pair(raw, at, j):
    """2 bits: of every 32 bytes the lowest pairs, then the next ones."""
    return _byte(raw, at + j // 128 * 32 + j % 32) >> (j // 32 % 4 * 2) & 3


@triton.jit
def _small(raw, halves, at, j, KIND: tl.constexpr):
    """Value j of blocks of 32 at byte `at`."""
    scale = _half(halves, at)
    if KIND == "Q8_0":
        y = _byte(raw, at + 2 + j).to(tl.int8).to(tl.float32) * scale
    else:
        codes: tl.constexpr = 2 if KIND == "Q4_0" else 4 if KIND == "Q4_1" else 6 if KIND == "Q5_0" else 8
        code = _byte(raw, at + codes + j % 16) >> (j // 16 * 4) & 15
        if KIND == "Q5_0" or KIND == "Q5_1":
            code += (_byte(raw, at + codes - 4 + j // 8) >> (j % 8) & 1) << 4
        if KIND == "Q4_0":
            y = (code - 8).to(tl.float32) * scale
        elif KIND == "Q5_0":
            y = (code - 16).to(tl.float32) * scale
        else:
            y = code.to(tl.float32) * scale + _half(halves, at + 2)
    return y


@triton.jit
def _large(raw, halves, at, j, KIND: tl.constexpr):
    """Value j of blocks of 256 at byte `at`."""
    if KIND == "Q6_K":
        code = _byte(raw, at + j // 128 * 64 + j % 64) >> (j // 64 % 2 * 4) & 15 | _pair(raw, at + 128, j) << 4
        y = (code - 32).to(tl.float32) * (_half(halves, at + 208) * _byte(raw, at + 192 + j // 16).to(tl.int8))
    elif KIND == "Q2_K":
        both = _byte(raw, at + j // 16)
        scale, least = _half(halves, at + 80) * (both & 15), _half(halves, at + 82) * (both >> 4)
        y = _pair(raw, at + 16, j) * scale - least
    elif KIND == "Q3_K":
        sub = j // 16
        low = _byte(raw, at + 96 + sub % 8) >> (sub // 8 * 4) & 15
        scale = low + ((_byte(raw, at + 104 + sub % 4) >> (sub // 4 * 2) & 3) << 4) - 32
        code = _pair(raw, at + 32, j) - 4 + ((_byte(raw, at + j % 32) >> (j // 32) & 1) << 2)
        y = code * (_half(halves, at + 108) * scale)
    else:  # 8 scales and 8 minima of 6 bits: four whole, four with their top bits in the others
        sub, packed = j // 32, at + 4
        first, second = _byte(raw, packed + sub % 4), _byte(raw, packed + 4 + sub % 4)
        third = _byte(raw, packed + 8 + sub % 4)
        whole = sub < 4
        scale = tl.where(whole, first & 63, third & 15 | first >> 6 << 4)
        least = tl.where(whole, second & 63, third >> 4 | second >> 6 << 4)
        codes: tl.constexpr = 16 if KIND == "Q4_K" else 48
        code = _byte(raw, at + codes + j // 64 * 32 + j % 32) >> (j // 32 % 2 * 4) & 15
        if KIND == "Q5_K":
            code += (_byte(raw, at + 16 + j % 32) >> (j // 32) & 1) << 4
        y = code * (_half(halves, at) * scale) - _half(halves, at + 2) * least
    return y


@triton.jit
def _value(raw, halves, index, KIND: tl.constexpr, BYTES: tl.constexpr, VALUES: tl.constexpr):
    """Value number `index` (int64) of a tensor. halves: the same bytes as float16."""
    at, j = index // VALUES * BYTES, (index % VALUES).to(tl.int32)
    if VALUES == 32:
        y = _small(raw, halves, at, j, KIND)
    else:
        y = _large(raw, halves, at, j, KIND)
    return y


@triton.jit
def _restore(
    raw, halves, out, count, KIND: tl.constexpr, BYTES: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    y = _value(raw, halves, tl.minimum(index, count - 1), KIND, BYTES, VALUES)
    tl.store(out + index, y.to(out.dtype.element_ty), mask=inside)


def _kind(encoding: str) -> dict[str, object]:
    block_bytes = TYPES[encoding][0]
    return {"KIND": encoding, "BYTES": block_bytes, "VALUES": 32 if block_bytes <= 34 else 256}


def restored(blocks: Tensor, encoding: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """All values of a weight (N, K) in dtype. Types that have no kernel here go through PyTorch."""
    if encoding not in KINDS:
        return restore(blocks, encoding, (shape[0], shape[1])).to(dtype)
    out = torch.empty(*shape, dtype=dtype, device=blocks.device)
    grid = (triton.cdiv(out.numel(), VALUES),)
    _restore[grid](blocks, blocks.view(torch.float16), out, out.numel(), **_kind(encoding), BLOCK=VALUES, num_warps=4)
    return out


def _linear(x: Tensor, blocks: Tensor, encoding: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """See the contract."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = F.linear(flat, restored(blocks, encoding, shape, x.dtype), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], shape[0])


def _fake(x: Tensor, blocks: Tensor, encoding: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


gguf_linear = opaque("gguf_linear", _linear, _fake)
