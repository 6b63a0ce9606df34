"""The attention kernel in Triton, for scores from 16-bit tokens or from tokens in 8 bits, and how it is launched.

One pass over the keys with sums kept per query, as FlashAttention-2 has it (Dao 2023, arXiv:2307.08691). It differs in
where the exponent is anchored. A softmax may subtract any constant per query, and bf16 and fp32 reach from 2^-126 to
2^127. So the constant is the largest score among the first keys, found once, and no running maximum and no rescaling
remain in the loop. It can only be too small; if a sum does overflow (a later score is larger by some 85), the tile is
done again with a running maximum. fp16 weights have no such reach and always take the running maximum.

Scores from 8 bits follow SageAttention (Zhang et al. 2024, arXiv:2410.02367): int8 products, exact in int32, scaled per
query and per block of keys; the weights and the values stay in 16 bits. The integer sums start at the bits of
1.5 * 2^23 as fp32: |sum| <= 128 * 127 * 127 < 2^22, so the result, read as fp32, is 1.5 * 2^23 + sum, and no conversion
is needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
LOG2_E = 1.4426950408889634
PROGRAMS = 264  # of `mend`: two for each multiprocessor of an H100
Scales = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """How the kernel is cut. Every value gives the same result up to the order of sums.

    block_m, block_n: queries and keys of a tile. warps, stages: of a program, of its pipeline of loads.
    ahead: the next tile's scores are computed while this one's weights are.
    tma: tiles are read through tensor descriptors (Hopper's copy engine; elsewhere Triton turns them into loads).
    registers: the most that a thread may hold; None: as the compiler likes.
    """

    block_m: int = 128
    block_n: int = 64
    warps: int = 8
    stages: int = 2
    ahead: bool = False
    tma: bool = False
    specialize: bool = False
    registers: int | None = None


@dataclass(frozen=True)
class Tokens8:
    """q and k in int8 as the kernel reads them: (B, H, L | S, D).

    q_scale (B, H, L) float32. k_scale (B, H, ceil(S / block) + 1) float32, one for `block` keys; the last is padding.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    block: int


@triton.jit
def load_tile(
    source, batch, head, row, stride, rows, BLOCK: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of one head, (BLOCK, DIM). A descriptor fills what lies behind the end with zeros, as MASKED does."""
    if TMA:
        tile = source.load([batch, row, head, 0]).reshape(BLOCK, DIM)
    else:
        lines = tl.arange(0, BLOCK)[:, None]
        start = tl.zeros([], tl.int64) + row
        pointers = source + start * stride + lines * stride + tl.arange(0, DIM)[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=lines < rows - row, other=0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def score(q, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr):
    """(BLOCK_M, BLOCK_N) float32: q kᵀ, or MAGIC + q kᵀ from int8."""
    if INT8:
        start = tl.full([BLOCK_M, BLOCK_N], MAGIC_BITS, tl.int32)
        s = tl.dot(q, tl.trans(k), start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    else:
        s = tl.dot(q, tl.trans(k))
    return s


@triton.jit
def weigh(s, factor, shift, INT8: tl.constexpr):
    """2^(score * factor - shift): one multiply-add and one exponential a score."""
    if INT8:
        shift += MAGIC * factor
    return tl.exp2(s * factor[:, None] - shift[:, None])


@triton.jit
def largest(s, factor, INT8: tl.constexpr):
    top = tl.max(s, 1)
    if INT8:
        top -= MAGIC
    return top * factor


@triton.jit
def anchored(
    q, factor, k, v, k_scale, batch, head, stride_k, stride_v, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIM: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Sums of weights and of weighted values, under the largest score of the first keys."""
    columns = tl.arange(0, BLOCK_N)[None, :]
    start = tl.zeros([], tl.int32)
    s = score(q, load_tile(k, batch, head, start, stride_k, keys, BLOCK_N, DIM, TMA, TAIL), BLOCK_M, BLOCK_N, INT8)
    f = factor
    next_scale = 1.0
    if INT8:
        next_scale = tl.load(k_scale)
        f = factor * next_scale
    if TAIL:
        shift = largest(tl.where(columns < keys, s, float("-inf")), f, INT8)
    else:
        shift = largest(s, f, INT8)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    if AHEAD:
        last = whole - BLOCK_N
        for row in tl.range(0, last, BLOCK_N, num_stages=STAGES, warp_specialize=SPECIALIZE):
            f = factor * next_scale
            if INT8:
                next_scale = tl.load(k_scale + row // BLOCK_N + 1)
            k_tile = load_tile(k, batch, head, row + BLOCK_N, stride_k, keys, BLOCK_N, DIM, TMA, False)
            s_next = score(q, k_tile, BLOCK_M, BLOCK_N, INT8)
            p = weigh(s, f, shift, INT8)
            total += tl.sum(p, 1)
            v_tile = load_tile(v, batch, head, row, stride_v, keys, BLOCK_N, DIM, TMA, False)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
            s = s_next
        if last >= 0:
            v_tile = load_tile(v, batch, head, last, stride_v, keys, BLOCK_N, DIM, TMA, False)
            p = weigh(s, factor * next_scale, shift, INT8)
            total += tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    else:
        for row in tl.range(0, whole, BLOCK_N, num_stages=STAGES, warp_specialize=SPECIALIZE):
            f = factor * next_scale
            if INT8:
                next_scale = tl.load(k_scale + row // BLOCK_N + 1)
            k_tile = load_tile(k, batch, head, row, stride_k, keys, BLOCK_N, DIM, TMA, False)
            p = weigh(score(q, k_tile, BLOCK_M, BLOCK_N, INT8), f, shift, INT8)
            total += tl.sum(p, 1)
            v_tile = load_tile(v, batch, head, row, stride_v, keys, BLOCK_N, DIM, TMA, False)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    if TAIL:
        f = factor
        if INT8:
            f = factor * tl.load(k_scale + whole // BLOCK_N)
        k_tile = load_tile(k, batch, head, whole, stride_k, keys, BLOCK_N, DIM, TMA, True)
        p = weigh(score(q, k_tile, BLOCK_M, BLOCK_N, INT8), f, shift, INT8)
        p = tl.where(columns < keys - whole, p, 0.0)
        total += tl.sum(p, 1)
        v_tile = load_tile(v, batch, head, whole, stride_v, keys, BLOCK_N, DIM, TMA, True)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    return acc, total


@triton.jit
def running(
    q, factor, k, v, k_scale, batch, head, stride_k, stride_v, keys, begin, end, top, total, acc,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same sums under a running maximum, over the keys from `begin` to `end`."""
    columns = tl.arange(0, BLOCK_N)[None, :]
    for row in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        f = factor
        if INT8:
            f = factor * tl.load(k_scale + row // BLOCK_N)
        s = score(q, load_tile(k, batch, head, row, stride_k, keys, BLOCK_N, DIM, TMA, MASKED), BLOCK_M, BLOCK_N, INT8)
        if MASKED:
            s = tl.where(columns < keys - row, s, float("-inf"))
        new_top = tl.maximum(top, largest(s, f, INT8))
        p = weigh(s, f, new_top, INT8)
        if MASKED:
            p = tl.where(columns < keys - row, p, 0.0)
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(p, 1)
        v_tile = load_tile(v, batch, head, row, stride_v, keys, BLOCK_N, DIM, TMA, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
    return acc, total, top


@triton.jit
def under_maximum(
    q, factor, k, v, k_scale, batch, head, stride_k, stride_v, keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr,
    TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of weights and of weighted values over all keys, under a running maximum."""
    whole = keys // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total = tl.zeros([BLOCK_M, DIM], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc, total, top = running(
        q, factor, k, v, k_scale, batch, head, stride_k, stride_v, keys, 0, whole, top, total, acc,
        BLOCK_M, BLOCK_N, DIM, INT8, TMA, False, STAGES,
    )  # fmt: skip
    if TAIL:
        acc, total, top = running(
            q, factor, k, v, k_scale, batch, head, stride_k, stride_v, keys, whole, keys, top, total, acc,
            BLOCK_M, BLOCK_N, DIM, INT8, TMA, True, 1,
        )  # fmt: skip
    return acc, total


@triton.jit
def attend(
    q, k, v, out, q_scale, k_scale, batch_strides, head_strides, token_strides, heads, queries, keys, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr,
    ANCHORED: tl.constexpr, TAIL: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys. Tiles of a head are neighbours, so its k and v stay in L2."""
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    row, plane = (pid % tiles) * BLOCK_M, pid // tiles
    batch, head = plane // heads, plane % heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    if not TMA:
        q += wide_batch * batch_strides[0] + wide_head * head_strides[0]
        k += wide_batch * batch_strides[1] + wide_head * head_strides[1]
        v += wide_batch * batch_strides[2] + wide_head * head_strides[2]
    lines = row + tl.arange(0, BLOCK_M)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if INT8:
        factor *= tl.load(q_scale + plane.to(tl.int64) * queries + lines, mask=lines < queries, other=0.0)
        k_scale += plane * (tl.cdiv(keys, BLOCK_N) + 1)
    q_tile = load_tile(q, batch, head, row, token_strides[0], queries, BLOCK_M, DIM, TMA, True)
    if ANCHORED:
        acc, total = anchored(
            q_tile, factor, k, v, k_scale, batch, head, token_strides[1], token_strides[2], keys, BLOCK_M, BLOCK_N,
            DIM, INT8, TMA, TAIL, AHEAD, STAGES, SPECIALIZE,
        )  # fmt: skip
        # In one reduction: of two in a row Triton 3.6 fails to compile the second for sm_100.
        sane = tl.abs(acc + total[:, None]) < float("inf")
        again = tl.min(sane.to(tl.int32)) == 0
    else:
        acc, total = tl.zeros([BLOCK_M, DIM], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        again = True
    if again:
        acc, total = under_maximum(
            q_tile, factor, k, v, k_scale, batch, head, token_strides[1], token_strides[2], keys,
            BLOCK_M, BLOCK_N, DIM, INT8, TMA, TAIL, STAGES,
        )  # fmt: skip
    out += wide_batch * batch_strides[3] + wide_head * head_strides[3]
    pointers = out + lines.to(tl.int64)[:, None] * token_strides[3] + tl.arange(0, DIM)[None, :]
    tl.store(pointers, (acc / total[:, None]).to(out.dtype.element_ty), mask=lines[:, None] < queries)


@triton.jit
def attend_again(
    flags, q, k, v, out, q_scale, k_scale, batch_strides, head_strides, token_strides, heads, queries, keys, scale,
    marked_tiles, count, MARKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
    INT8: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Under a running maximum, the tiles of MARKED queries whose flag is set; usually none."""
    for marked in range(tl.program_id(0), count, tl.num_programs(0)):
        if tl.load(flags + marked) != 0:
            plane, first = marked // marked_tiles, (marked % marked_tiles) * MARKED
            batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
            q_head = q + batch * batch_strides[0] + head * head_strides[0]
            k_head = k + batch * batch_strides[1] + head * head_strides[1]
            v_head = v + batch * batch_strides[2] + head * head_strides[2]
            out_head = out + batch * batch_strides[3] + head * head_strides[3]
            scale_head = k_scale + plane * (tl.cdiv(keys, BLOCK_N) + 1)
            for row in range(first, tl.minimum(first + MARKED, queries), BLOCK_M):
                lines = row + tl.arange(0, BLOCK_M)
                factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
                if INT8:
                    places = q_scale + plane.to(tl.int64) * queries + lines
                    factor *= tl.load(places, mask=lines < queries, other=0.0)
                q_tile = load_tile(q_head, 0, 0, row, token_strides[0], queries, BLOCK_M, DIM, False, True)
                acc, total = under_maximum(
                    q_tile, factor, k_head, v_head, scale_head, 0, 0, token_strides[1], token_strides[2], keys,
                    BLOCK_M, BLOCK_N, DIM, INT8, False, TAIL, STAGES,
                )  # fmt: skip
                pointers = out_head + lines.to(tl.int64)[:, None] * token_strides[3] + tl.arange(0, DIM)[None, :]
                tl.store(pointers, (acc / total[:, None]).to(out.dtype.element_ty), mask=lines[:, None] < queries)


def mend(
    flags: Tensor,
    marked: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scales: Scales | None = None,
    block: int = 64,
) -> None:
    """Compute again, into out (B, L, H, D), the tiles of an anchored softmax that left float32's range.

    flags: (B, H, ceil(L / marked)) int32, set where a tile of `marked` queries did. q, k, v: (B, L | S, H, D). scales:
    of int8 q and k, those of k for `block` keys each.
    """
    (_, queries, heads, dim), keys = q.shape, k.shape[1]
    strides = [x.stride() for x in (q, k, v, out)]
    q_scale, k_scale = scales or (flags, flags)
    attend_again[(min(flags.numel(), PROGRAMS),)](
        flags, q, k, v, out, q_scale, k_scale,
        tuple(s[0] for s in strides), tuple(s[2] for s in strides), tuple(s[1] for s in strides),
        heads, queries, keys, dim**-0.5 * LOG2_E, flags.shape[2], flags.numel(),
        MARKED=marked, BLOCK_M=64, BLOCK_N=block, DIM=dim, INT8=scales is not None, TAIL=keys % block != 0, STAGES=2,
        num_warps=4,
    )  # fmt: skip


def exact(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H, D), all bf16 or all fp16 -> (B, L, H, D)."""
    return _launch(q, k, v, None, None, config)


def from_int8(tokens: Tokens8, v: Tensor, config: Config) -> Tensor:
    """q and k in 8 bits, v (B, S, H, D) -> (B, L, H, D) in the dtype of v. `config.block_n` keys share a scale."""
    if tokens.block != config.block_n:
        raise ValueError(f"k has a scale for each {tokens.block} keys, but tiles have {config.block_n}: make both one")
    q, k = tokens.q.transpose(1, 2), tokens.k.transpose(1, 2)
    return _launch(q, k, v, tokens.q_scale, tokens.k_scale, config)


def _launch(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, config: Config) -> Tensor:
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    out = torch.empty(batch, queries, heads, dim, dtype=v.dtype, device=v.device)
    int8 = q_scale is not None
    rows = (config.block_m, config.block_n, config.block_n)
    inputs = [_addressable(x, config.tma) for x in (q, k, v)]
    strides = [x.stride() for x in (*inputs, out)]
    sources = [_described(x, n) for x, n in zip(inputs, rows, strict=True)] if config.tma else inputs
    limits = {} if config.registers is None else {"maxnreg": config.registers}
    attend[(triton.cdiv(queries, config.block_m) * heads * batch,)](
        *sources, out, q_scale if int8 else out, k_scale if int8 else out,
        tuple(s[0] for s in strides), tuple(s[2] for s in strides), tuple(s[1] for s in strides),
        heads, queries, keys, dim**-0.5 * LOG2_E,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIM=dim, INT8=int8, TMA=config.tma,
        ANCHORED=v.dtype != torch.float16, TAIL=keys % config.block_n != 0, AHEAD=config.ahead, STAGES=config.stages,
        SPECIALIZE=config.specialize, num_warps=config.warps, num_stages=config.stages, **limits,
    )  # fmt: skip
    return out


def _addressable(x: Tensor, tma: bool) -> Tensor:
    """x, or a copy of it if its last dimension is strided or tensor descriptors cannot express its strides."""
    aligned = x.data_ptr() % 16 == 0 and all(
        0 < stride and stride * x.itemsize % 16 == 0
        for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
        if size > 1
    )
    return x if x.stride(-1) == 1 and (aligned or not tma) else x.contiguous()


def _described(x: Tensor, rows: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton 3.2 has none, and few GPUs want one

    # A dimension of one element may have any stride, also one that a descriptor refuses.
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride(), x.shape, strict=True)]
    strides[-1] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, rows, 1, x.shape[-1]])
