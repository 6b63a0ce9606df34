"""GGML's blocks in Triton: one value at a time, from wherever its bits lie in its block.

Two ways to multiply. For a few tokens the blocks are restored inside the product, so that the weight is read once, in
its packed size. For many the weight is restored to a scratch tensor first and cuBLAS multiplies: restoring takes some
0.1 ms where the product takes 2 to 7, and inside a product every tile of tokens would restore the same blocks again.
Layouts: see `lightx2v_kernels/ggml.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.ggml import TYPES, restore
from lightx2v_kernels.opaque import opaque

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FEW = 64  # tokens up to which the blocks are restored inside the product
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


@triton.jit
def _multiply(
    x, raw, halves, bias, out, M, N, K,
    KIND: tl.constexpr, BYTES: tl.constexpr, VALUES: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """K is a multiple of BLOCK_K."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + tl.minimum(row, M - 1)[:, None].to(tl.int64) * K + k[None, :]
    index = tl.minimum(column, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(K // BLOCK_K):
        weight = _value(raw, halves, index, KIND, BYTES, VALUES).to(x.dtype.element_ty)
        total = tl.dot(tl.load(x_at), weight.T, total)
        x_at += BLOCK_K
        index += BLOCK_K
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * N + column[None, :], total.to(out.dtype.element_ty), mask=inside)


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


def multiplied(x: Tensor, blocks: Tensor, encoding: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """x (M, K) times the transposed weight (N, K), which is restored tile by tile."""
    (m, k), n = x.shape, shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m, block_n = (16 if m <= 16 else 64), 32
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m))
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128 if k % 128 == 0 else 32}
    added = x if bias is None else bias
    _multiply[grid](
        x, blocks, blocks.view(torch.float16), added, out, m, n, k,
        **_kind(encoding), BIAS=bias is not None, **sizes, num_warps=8,
    )  # fmt: skip
    return out


def _linear(x: Tensor, blocks: Tensor, encoding: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    """See the contract."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] <= FEW and encoding in KINDS:
        y = multiplied(flat, blocks, encoding, shape, bias)
    else:
        y = F.linear(flat, restored(blocks, encoding, shape, x.dtype), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], shape[0])


def _fake(x: Tensor, blocks: Tensor, encoding: str, shape: Sequence[int], bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


gguf_linear = opaque("gguf_linear", _linear, _fake)
