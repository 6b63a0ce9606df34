"""Attention for Hopper in Gluon, Triton's lower-level language, in which every warp's work and every wait is written.

One warp copies keys and values by TMA into a ring of shared memory; three warpgroups compute 64 queries each, against
the same keys, so that a tile that was read once serves 192 queries. Each issues the products of the next scores beside
those of the last weights with their values, and takes the softmax while they run; and the three take turns at issuing,
so that the tensor cores have one's products while the others take their exponentials. The roles and the turns are
FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608); the anchored softmax and scores from int8 are those of
`_triton.py`, which says why they are right. 64 keys a tile leave a thread of 160 registers enough for three warpgroups.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightx2v_kernels.attention._triton import LOG2_E, Tokens8, mend

ROWS = gl.constexpr(64)  # queries of a warpgroup
# Two names that changed after Triton 3.6.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # of a warpgroup
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2^23, and its bits
MAGIC_BITS = gl.constexpr(0x4B400000)


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut. Every value gives the same result up to the order of sums.

    groups: warpgroups that compute, 2 or 3. keys: of a tile. stages: tiles in flight. early: the next tile of keys is
        waited for before the products with values are. Nothing is moved across that wait's branch, so the exponentials
        stay before it, beside those products; without it the compiler sinks half of them behind.
    """

    groups: int = 3
    keys: int = 64
    stages: int = 4
    early: bool = False

    @property
    def queries(self) -> int:
        """Of a program."""
        return self.groups * ROWS.value


# Of the cuts that do not spill, the fastest on an H100 at 32,760 tokens and 40 heads; exact ones are alike to 3 %.
EXACT, INT8 = Cut(), Cut(early=True)


@gluon.jit
def load(
    q, k, v, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
    q_row, k_row, v_row, qk_column, v_column, tiles, GROUPS: gl.constexpr,
):  # fmt: skip
    """The warp that copies: the queries once, then keys and values as their places become empty."""
    KEYS: gl.constexpr = k.block_shape[0]
    STAGES: gl.constexpr = k_tiles.shape[0]
    mbarrier.expect(q_full, GROUPS * q.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        copy_tile(q, [q_row + group * ROWS, qk_column], q_full, q_tile.index(group))
    for tile in range(tiles):
        place = tile % STAGES
        turn = (tile // STAGES) & 1
        mbarrier.wait(k_empty.index(place), turn ^ 1)
        mbarrier.expect(k_full.index(place), k.block_type.nbytes)
        copy_tile(k, [k_row + tile * KEYS, qk_column], k_full.index(place), k_tiles.index(place))
        mbarrier.wait(v_empty.index(place), turn ^ 1)
        mbarrier.expect(v_full.index(place), v.block_type.nbytes)
        copy_tile(v, [v_row + tile * KEYS, v_column], v_full.index(place), v_tiles.index(place))


@gluon.jit
def begin_scores(q, k, SCORES: gl.constexpr, INT8: gl.constexpr):
    """q kᵀ (ROWS, keys) on its way: float32, or int32 on top of MAGIC_BITS."""
    KEYS: gl.constexpr = k.shape[0]
    if INT8:
        start = gl.full([ROWS, KEYS], MAGIC_BITS, gl.int32, SCORES)
    else:
        start = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), start, use_acc=INT8, is_async=True)


@gluon.jit
def finish_scores(scores, pending: gl.constexpr, full, INT8: gl.constexpr):
    """The scores as float32, once at most `pending` later products run; their keys may then be overwritten."""
    s = warpgroup_mma_wait(pending, [scores])
    barrier()  # one thread arrives for all four warps
    mbarrier.arrive(full)
    if INT8:
        out = s.to(gl.float32, bitcast=True)
    else:
        out = s
    return out


@gluon.jit
def mask(s, keys, SCORES: gl.constexpr):
    """-inf for columns from `keys` on: what TMA read there belongs to nobody."""
    columns = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, SCORES))
    return gl.where(columns[None, :] < keys, s, float("-inf"))


@gluon.jit
def largest(s, factor, INT8: gl.constexpr):
    """(ROWS,): the greatest score times `factor`."""
    top = gl.max(s, 1)
    if INT8:
        top = top - MAGIC
    return top * factor


@gluon.jit
def weigh(s, factor, shift, INT8: gl.constexpr):
    """2^(score * factor - shift), factor and shift (ROWS,)."""
    if INT8:
        shift = shift + MAGIC * factor
    return gl.exp2(s * factor[:, None] - shift[:, None])


@gluon.jit
def advance(
    tile, acc, shift, total, weights, factor, k_scale, keys, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    turns, GROUP: gl.constexpr, LAST: gl.constexpr, INT8: gl.constexpr, ANCHORED: gl.constexpr, SCORES: gl.constexpr,
    OUT: gl.constexpr, GROUPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Scores of a tile beside the values of the one before it, then the softmax of this tile."""
    KEYS: gl.constexpr = k_tiles.shape[1]
    STAGES: gl.constexpr = k_tiles.shape[0]
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    place, before = tile % STAGES, (tile - 1) % STAGES
    f = factor
    if INT8:
        f = factor * gl.load(k_scale + tile)
    if not EARLY:
        mbarrier.wait(k_full.index(place), (tile // STAGES) & 1)
    mbarrier.wait(turns.index(GROUP), (tile - 1) & 1)
    scores = begin_scores(q, k_tiles.index(place), SCORES, INT8)
    mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
    sums = warpgroup_mma(weights, v_tiles.index(before), acc, use_acc=True, is_async=True)
    mbarrier.arrive(turns.index((GROUP + 1) % GROUPS))
    s = finish_scores(scores, 1, k_empty.index(place), INT8)
    if LAST:
        s = mask(s, keys - tile * KEYS, SCORES)
    if ANCHORED:
        p = weigh(s, f, shift, INT8)
        total = total + gl.sum(p, 1)
    else:
        top = gl.maximum(shift, largest(s, f, INT8))
        p = weigh(s, f, top, INT8)
        shrink = gl.exp2(shift - top)
        total = total * shrink + gl.sum(p, 1)
        shift = top
    if EARLY and not LAST:
        mbarrier.wait(k_full.index((tile + 1) % STAGES), ((tile + 1) // STAGES) & 1)
    # `weights` are named here because the tensor cores read their registers until now.
    acc, weights = warpgroup_mma_wait(0, [sums, weights])
    barrier()
    mbarrier.arrive(v_empty.index(before))
    if not ANCHORED:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    weights = gl.convert_layout(p.to(v_tiles.dtype), WEIGHTS)
    return acc, shift, total, weights


@gluon.jit
def compute(
    GROUP: gl.constexpr, out, flag, q_scale, k_scale, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full,
    v_empty, turns, first, queries, keys, tiles, token_stride, scale,
    DIM: gl.constexpr, INT8: gl.constexpr, ANCHORED: gl.constexpr, GROUPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One warpgroup: ROWS queries against all keys. out, q_scale, k_scale: of this head."""
    KEYS: gl.constexpr = k_tiles.shape[1]
    STAGES: gl.constexpr = k_tiles.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32 if INT8 else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    rows = first + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    factor = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, SCORES)) * scale
    if INT8:
        factor = factor * gl.load(q_scale + rows, mask=rows < queries, other=0.0)
    mbarrier.wait(q_full, 0)
    q = q_tile.index(GROUP)

    mbarrier.wait(k_full.index(0), 0)
    scores = begin_scores(q, k_tiles.index(0), SCORES, INT8)
    s = finish_scores(scores, 0, k_empty.index(0), INT8)
    if tiles == 1:
        s = mask(s, keys, SCORES)
    f = factor
    if INT8:
        f = factor * gl.load(k_scale)
    shift = largest(s, f, INT8)
    p = weigh(s, f, shift, INT8)
    total = gl.sum(p, 1)
    acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
    weights = gl.convert_layout(p.to(v_tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
    if EARLY:
        mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=tiles > 1)

    for tile in range(1, tiles - 1):
        acc, shift, total, weights = advance(
            tile, acc, shift, total, weights, factor, k_scale, keys, q, k_tiles, v_tiles, k_full, k_empty, v_full,
            v_empty, turns, GROUP, False, INT8, ANCHORED, SCORES, OUT, GROUPS, EARLY,
        )  # fmt: skip
    if tiles > 1:
        acc, shift, total, weights = advance(
            tiles - 1, acc, shift, total, weights, factor, k_scale, keys, q, k_tiles, v_tiles, k_full, k_empty, v_full,
            v_empty, turns, GROUP, True, INT8, ANCHORED, SCORES, OUT, GROUPS, EARLY,
        )  # fmt: skip

    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    sums = warpgroup_mma(weights, v_tiles.index(last), acc, use_acc=True, is_async=True)
    acc, weights = warpgroup_mma_wait(0, [sums, weights])
    total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    lines = first + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    if ANCHORED:  # rows behind the end are nobody's, and may hold anything
        sane = (gl.abs(gl.sum(acc, 1) + total) < float("inf")) | (lines >= queries)
        gl.atomic_max(flag, 1 - gl.min(sane.to(gl.int32), 0))
    acc = acc / total[:, None]
    channels = gl.arange(0, DIM, layout=gl.SliceLayout(0, OUT))
    places = out + lines.to(gl.int64)[:, None] * token_stride + channels[None, :]
    gl.store(places, acc.to(out.dtype.element_ty), mask=(lines < queries)[:, None])


@gluon.jit
def attend(
    q, k, v, out, flags, q_scale, k_scale, queries, keys, heads, scale,
    DIM: gl.constexpr, INT8: gl.constexpr, ANCHORED: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Grid (query tiles, heads, batch): GROUPS * ROWS queries of one head against all keys.

    q, k, v: descriptors of (tokens, channels), of int8 q and k head after head. flags: one a program, see `mend`.
    """
    KEYS: gl.constexpr = k.block_shape[0]
    PLACES: gl.constexpr = 2 if GROUPS == 2 else 4  # shapes are powers of two
    head, batch = gl.program_id(1), gl.program_id(2)
    plane = batch * heads + head
    first = gl.program_id(0) * (GROUPS * ROWS)
    tiles = gl.cdiv(keys, KEYS)
    q_tile = gl.allocate_shared_memory(q.dtype, [PLACES, ROWS, DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, KEYS, DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, KEYS, DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for place in gl.static_range(STAGES):
        mbarrier.init(k_full.index(place), count=1)
        mbarrier.init(k_empty.index(place), count=GROUPS)
        mbarrier.init(v_full.index(place), count=1)
        mbarrier.init(v_empty.index(place), count=GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0))

    v_row, v_column = batch * keys, head * DIM
    if INT8:
        q_row, k_row, qk_column = plane * queries + first, plane * keys, 0
    else:
        q_row, k_row, qk_column = batch * queries + first, v_row, v_column
    out += (batch.to(gl.int64) * queries * heads + head) * DIM
    flags += plane * gl.num_programs(0) + gl.program_id(0)
    if INT8:
        q_scale += plane.to(gl.int64) * queries
        k_scale += plane.to(gl.int64) * (tiles + 1)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    compute,
                    (0, out, flags, q_scale, k_scale, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full,
                     v_empty, turns, first, queries, keys, tiles, heads * DIM, scale, DIM, INT8, ANCHORED, GROUPS,
                     EARLY),
                ),
                (
                    compute,
                    (1, out, flags, q_scale, k_scale, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full,
                     v_empty, turns, first, queries, keys, tiles, heads * DIM, scale, DIM, INT8, ANCHORED, GROUPS,
                     EARLY),
                ),
                (
                    load,
                    (q, k, v, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                     q_row, k_row, v_row, qk_column, v_column, tiles, GROUPS),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    compute,
                    (0, out, flags, q_scale, k_scale, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full,
                     v_empty, turns, first, queries, keys, tiles, heads * DIM, scale, DIM, INT8, ANCHORED, GROUPS,
                     EARLY),
                ),
                (
                    compute,
                    (1, out, flags, q_scale, k_scale, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full,
                     v_empty, turns, first, queries, keys, tiles, heads * DIM, scale, DIM, INT8, ANCHORED, GROUPS,
                     EARLY),
                ),
                (
                    compute,
                    (2, out, flags, q_scale, k_scale, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full,
                     v_empty, turns, first, queries, keys, tiles, heads * DIM, scale, DIM, INT8, ANCHORED, GROUPS,
                     EARLY),
                ),
                (
                    load,
                    (q, k, v, q_tile, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                     q_row, k_row, v_row, qk_column, v_column, tiles, GROUPS),
                ),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


def exact(q: Tensor, k: Tensor, v: Tensor, cut: Cut = EXACT) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H, D), all bf16 or all fp16 -> (B, L, H, D)."""
    q, k, v = (_lines(x) for x in (q, k, v))
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3])
    tiles = [_token_major(q, ROWS.value), _token_major(k, cut.keys), _token_major(v, cut.keys)]
    out, flags = _launch(tiles, None, v.dtype, shape, cut)
    if flags is not None:
        mend(flags, cut.queries, q, k, v, out)
    return out


def from_int8(tokens: Tokens8, v: Tensor, cut: Cut = INT8) -> Tensor:
    """q and k in 8 bits, a scale for each `cut.keys` keys, v (B, S, H, D) -> (B, L, H, D) in the dtype of v."""
    if tokens.block != cut.keys:
        raise ValueError(f"k has a scale for each {tokens.block} keys, but tiles have {cut.keys}: make both one")
    v = _lines(v)
    batch, heads, queries, dim = tokens.q.shape
    tiles = [_head_major(tokens.q, ROWS.value), _head_major(tokens.k, cut.keys), _token_major(v, cut.keys)]
    out, flags = _launch(tiles, tokens, v.dtype, (batch, queries, v.shape[1], heads, dim), cut)
    if flags is not None:
        q, k = tokens.q.transpose(1, 2), tokens.k.transpose(1, 2)
        mend(flags, cut.queries, q, k, v, out, (tokens.q_scale, tokens.k_scale), tokens.block)
    return out


def _launch(
    tiles: list[Any], tokens: Tokens8 | None, dtype: torch.dtype, shape: tuple[int, int, int, int, int], cut: Cut
) -> tuple[Tensor, Tensor | None]:
    """The result, and which programs of (B, H, tiles) left the range of the anchored softmax; None in fp16, which has
    none."""
    batch, queries, keys, heads, dim = shape
    device = tiles[2].base.device
    out = torch.empty(batch, queries, heads, dim, dtype=dtype, device=device)
    grid = (triton.cdiv(queries, cut.queries), heads, batch)
    anchored = dtype == torch.bfloat16
    flags = torch.zeros(batch, heads, grid[0], dtype=torch.int32, device=device)
    scales = (tokens.q_scale, tokens.k_scale) if tokens is not None else (flags, flags)
    attend[grid](
        *tiles, out, flags, *scales, queries, keys, heads, dim**-0.5 * LOG2_E,
        DIM=dim, INT8=tokens is not None, ANCHORED=anchored, GROUPS=cut.groups, STAGES=cut.stages, EARLY=cut.early,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, flags if anchored else None


def _lines(x: Tensor) -> Tensor:
    """x (B, L, H, D) with heads side by side and batches one after another, as one descriptor of lines reads it."""
    batch, tokens, _, dim = x.shape
    joined = x.stride(3) == 1 and x.stride(2) == dim and (batch == 1 or x.stride(0) == tokens * x.stride(1))
    return x if joined and x.data_ptr() % 16 == 0 and x.stride(1) * x.itemsize % 16 == 0 else x.contiguous()


def _token_major(x: Tensor, rows: int) -> TensorDescriptor:
    batch, tokens, heads, dim = x.shape
    return _descriptor(x, (batch * tokens, heads * dim), x.stride(1) if tokens > 1 else heads * dim, rows)


def _head_major(x: Tensor, rows: int) -> TensorDescriptor:
    batch, heads, tokens, dim = x.shape
    return _descriptor(x, (batch * heads * tokens, dim), dim, rows)


def _descriptor(x: Tensor, shape: tuple[int, int], stride: int, rows: int) -> TensorDescriptor:
    dim = x.shape[-1]
    return TensorDescriptor(x, list(shape), [stride, 1], [rows, dim], _layout(dim, x.itemsize))


@functools.cache
def _layout(dim: int, itemsize: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(min(128, dim * itemsize), 8 * itemsize, 2)
