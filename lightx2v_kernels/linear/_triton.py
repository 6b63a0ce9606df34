"""8-bit matrix products in Triton: int8 with int32 sums, e4m3 with fp32 sums, scales and bias in the epilogue.

One program computes one tile of the result. Programs that run at the same time share rows and columns: they walk the
tiles in groups of `GROUP_M` rows of tiles, so that what they read stays in the L2 cache. Tokens and weight are read
along K, which is the layout that 8-bit tensor cores want of both (NVIDIA PTX ISA, wgmma: "K-major" for .s8 and .e4m3).

Two ways to read a tile: by addresses ("tiles"), on any GPU, and by the copy engine of Hopper and later ("tma"), which
needs rows of a multiple of 16 bytes and takes the address arithmetic off the registers.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.opaque import opaque

ALL = 1 << 30  # programs: as many as there are tiles
HOPPER = (9, 0)


@dataclass(frozen=True)
class Tiling:
    """One way to cut the work. promote: values along K that fp8 sums in the tensor core's own registers before they are
    added up in fp32; 0: all of them, which is faster and keeps about 14 bits of each sum (DeepSeek-V3,
    arXiv:2412.19437, section 3.3.2). persistent: a program for each multiprocessor walks several tiles."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    group_m: int = 8
    warps: int = 8
    stages: int = 3
    tma: bool = False
    persistent: bool = False
    promote: int = 0


@triton.jit
def _tile(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile a program computes: down the rows of a group first, then to the next column."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * tiles_n
    first = index // in_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def _store(out, total, scale, weight_scale, bias, row, column, M, N, BIAS: tl.constexpr, WIDE: tl.constexpr):
    """Sums (BLOCK_M, BLOCK_N) -> out, scaled by row and column. row, column: of each sum, past the end too."""
    inside_m, inside_n = row < M, column < N
    by_row = tl.load(scale + row, mask=inside_m, other=0.0)
    by_column = tl.load(weight_scale + column, mask=inside_n, other=0.0)
    y = total.to(tl.float32) * by_row[:, None] * by_column[None, :]
    if BIAS:
        y += tl.load(bias + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    at = row[:, None].to(tl.int64) * N + column[None, :] if WIDE else row[:, None] * N + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


@triton.jit
def _dot(a, b, total, INTEGER: tl.constexpr, PROMOTE: tl.constexpr):
    """total + a (BLOCK_M, BLOCK_K) . b (BLOCK_N, BLOCK_K)^T"""
    if INTEGER:
        total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
    elif PROMOTE > 0:
        total = tl.dot(a, tl.trans(b), total, max_num_imprecise_acc=PROMOTE)
    else:
        total = tl.dot(a, tl.trans(b), total)
    return total


@triton.jit
def _by_address(
    values, weight, scale, weight_scale, bias, out, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, INTEGER: tl.constexpr, PROMOTE: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one again, so that no load needs a mask; they are not stored.
    a_row, b_row = tl.minimum(row, M - 1), tl.minimum(column, N - 1)
    if WIDE:
        a_row, b_row = a_row.to(tl.int64), b_row.to(tl.int64)
    a_at, b_at = values + a_row[:, None] * K + k[None, :], weight + b_row[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            inside = (k < K - step * BLOCK_K)[None, :]
            a, b = tl.load(a_at, mask=inside, other=0.0), tl.load(b_at, mask=inside, other=0.0)
        total = _dot(a, b, total, INTEGER, PROMOTE)
        a_at += BLOCK_K
        b_at += BLOCK_K
    _store(out, total, scale, weight_scale, bias, row, column, M, N, BIAS, WIDE)


@triton.jit
def _by_copy_engine(
    values, weight, scale, weight_scale, bias, out, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, INTEGER: tl.constexpr, PROMOTE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """values, weight: descriptors, whose copies are zeros past the end. PROGRAMS: how many share the tiles, or more."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        tile_m, tile_n = _tile(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            a = values.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = weight.load([tile_n * BLOCK_N, step * BLOCK_K])
            total = _dot(a, b, total, INTEGER, PROMOTE)
        row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _store(out, total, scale, weight_scale, bias, row, column, M, N, BIAS, WIDE)


def product(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """values (M, K), scale (M,), weight (N, K), weight_scale (N,) -> (M, N), all contiguous."""
    (m, k), n = values.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=values.device)
    tiles = triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    shared = {
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "GROUP_M": tiling.group_m,
        "BIAS": bias is not None,
        "WIDE": max(m * n, m * k, n * k) >= 2**31,
        "INTEGER": values.dtype == torch.int8,
        "PROMOTE": min(tiling.promote, tiling.block_k),
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    rest = (scale, weight_scale, weight_scale if bias is None else bias, out, m, n, k)
    if not tiling.tma:
        _by_address[(tiles,)](values, weight, *rest, EVEN_K=k % tiling.block_k == 0, **shared)
        return out
    # A number that does not change with the size of the video, or each size would be compiled anew.
    programs = multiprocessors(values.device) if tiling.persistent else ALL
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton 3.2 has none, and few GPUs want one

    a = TensorDescriptor.from_tensor(values, [tiling.block_m, tiling.block_k])
    b = TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k])
    _by_copy_engine[(min(tiles, programs),)](a, b, *rest, PROGRAMS=programs, **shared)
    return out


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 where Triton's interpreter walks the programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


WIDE = Tiling()  # many tokens: as large a tile as fits the registers
NARROW = Tiling(block_m=64, block_n=128, block_k=128, warps=4, stages=4)  # text: more programs than tiles of the wide
FEW = Tiling(block_m=16, block_n=64, block_k=128, warps=4, stages=4)  # one token a sample
PROMOTED = Tiling(block_m=128, block_n=128, warps=8, stages=4, promote=128)  # two sets of sums have to fit
# On Hopper, at 32760 tokens of Wan 14B (H100, benchmarks/linear.py): int8 1174, 1125 and 1218 TFLOP/s for 5120->5120,
# 5120->13824 and 13824->5120, by address 1079 to 1150; fp8 1331, 1296 and, a tile a program, 1482.
HOPPER_INT8 = Tiling(tma=True, persistent=True)
HOPPER_FP8 = Tiling(stages=4, tma=True, persistent=True)
HOPPER_FP8_LONG = Tiling(stages=4, tma=True)  # more values in a row than rows


def tiling_for(tokens: int, rows: int, size: int, *, integer: bool, exact: bool, hopper: bool) -> Tiling:
    """How a product of (tokens, size) and (rows, size) is cut. exact: fp8 sums are promoted to fp32 on the way."""
    if tokens <= 16:
        return FEW
    if exact and not integer:
        return PROMOTED
    if tokens <= 1024:
        return NARROW
    if integer:
        return HOPPER_INT8 if hopper else WIDE
    return WIDE if not hopper else HOPPER_FP8_LONG if size > rows else HOPPER_FP8


def _linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _cut(values, scale, weight, weight_scale, bias, dtype, exact=False)


def _exact(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _cut(values, scale, weight, weight_scale, bias, dtype, exact=True)


def _cut(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    exact: bool,
) -> Tensor:
    flat, (rows, size) = values.reshape(-1, values.shape[-1]).contiguous(), weight.shape
    hopper, integer = is_hopper(values.device), values.dtype == torch.int8
    tiling = tiling_for(len(flat), rows, size, integer=integer, exact=exact, hopper=hopper)
    y = product(flat, scale.reshape(-1).contiguous(), weight.contiguous(), weight_scale, bias, dtype, tiling)
    return y.view(*values.shape[:-1], rows)


def _fake(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=dtype)


int8_linear = opaque("int8_linear", _linear, _fake)
fp8_linear = opaque("fp8_linear", _linear, _fake)
fp8_linear_exact = opaque("fp8_linear_exact", _exact, _fake)
