"""q and k of attention in int8, as `_triton.py` reads them: from finished heads, or straight from two projections.

q gets one scale a token and head. k gets one a head and block of keys, so that a tile of scores has one factor; before
that, one vector a head is taken off every key: softmax does not see it, and channels that hardly vary from token to
token (SageAttention, arXiv:2410.02367, section 3.2) no longer eat up the 8 bits. Any vector is exact; the mean of some
128 tokens spread over the sequence is as good as that of all, and costs next to nothing.

Straight from projections: RMS norm, rotary embedding and the rounding in one kernel, with nothing rounded in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.attention._triton import Tokens8

SAMPLES = 128
HEADS_EACH = 8
TOKENS = 4  # of a program that reads them twice
# 1.5 * 2^23: adding it to fp32 below 2^22 and taking it off again rounds to whole numbers, ties to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def magnitude(x, AXIS: tl.constexpr):
    """The largest |x| along AXIS, by the bits of fp32: as whole numbers they have the same order, and NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, amax):
    """x in int8 and its scale. An infinite or NaN value makes the scale so; where x is all but 0, 0 times 1."""
    scale = tl.where(amax < 1e-30, 1.0, amax / 127)
    return (x * (1 / scale) + ROUND - ROUND).to(tl.int8), scale


@triton.jit
def store_rounded(
    x,
    values,
    scales,
    plane,
    block,
    rows,
    scales_each,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """Round x (BLOCK, DIM) fp32, block number `block` of a plane (batch and head), and store it with its scales."""
    lines = block * BLOCK + tl.arange(0, BLOCK)
    scales += plane.to(tl.int64) * scales_each
    if PER_TOKEN:
        whole, scale = rounded(x, magnitude(x, 1)[:, None])
        tl.store(scales + lines[:, None], scale, mask=lines[:, None] < rows)
    else:
        whole, scale = rounded(x, magnitude(magnitude(x, 1), 0))
        tl.store(scales + block, scale)
    pointers = values + (plane.to(tl.int64) * rows + lines[:, None]) * DIM + tl.arange(0, DIM)[None, :]
    tl.store(pointers, whole, mask=lines[:, None] < rows)


@triton.jit
def quantize_heads(
    x,
    mean,
    values,
    scales,
    batch_stride,
    token_stride,
    head_stride,
    heads,
    rows,
    scales_each,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """x (B, L, H, D), mean (B, H, D) float32 -> values (B, H, L, D), scales (B, H, scales_each)."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lines = block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, DIM)
    x += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    inside = lines[:, None] < rows
    tile = tl.load(x + lines.to(tl.int64)[:, None] * token_stride + channels[None, :], mask=inside, other=0.0)
    tile = tile.to(tl.float32)
    plane = batch * heads + head
    if SMOOTH:
        tile = tl.where(inside, tile - tl.load(mean + plane * DIM + channels)[None, :], 0.0)
    store_rounded(tile, values, scales, plane, block, rows, scales_each, BLOCK, DIM, PER_TOKEN)


@triton.jit
def inverse_rms(x, out, batch_stride, token_stride, tokens, eps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """x (B, L, C) -> out (B, L) float32: 1 / sqrt(mean(x^2) + eps). One program a token."""
    token, batch = tl.program_id(0), tl.program_id(1)
    x += batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    channels = tl.arange(0, BLOCK)
    row = tl.load(x + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)
    tl.store(out + batch.to(tl.int64) * tokens + token, 1 / tl.sqrt(tl.sum(row * row, 0) / CHANNELS + eps))


@triton.jit
def normed_and_turned(
    x,
    weight,
    inverse,
    cos,
    sin,
    lines,
    tokens,
    token_stride,
    eps,
    head,
    step,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """(BLOCK, DIM) float32: one head of tokens `lines`, after RMS norm and rotary embedding; zeros behind the end.

    x, inverse: of this batch. cos, sin (BLOCK, DIM / 2). PER_HEAD: the norm is that of the head alone.
    """
    channels = tl.arange(0, DIM)
    inside = lines[:, None] < tokens
    places = lines.to(tl.int64) * step
    tile = tl.load(x + places[:, None] * token_stride + head * DIM + channels[None, :], mask=inside, other=0.0)
    tile = tile.to(tl.float32)
    if PER_HEAD:
        scale = 1 / tl.sqrt(tl.sum(tile * tile, 1) / DIM + eps)
        gain = tl.load(weight + channels).to(tl.float32)
    else:
        scale = tl.load(inverse + places, mask=lines < tokens, other=0.0)
        gain = tl.load(weight + head * DIM + channels).to(tl.float32)
    even, odd = tl.split((tile * scale[:, None] * gain[None, :]).reshape(BLOCK, DIM // 2, 2))
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(BLOCK, DIM)


@triton.jit
def turns(table, lines, tokens, step, DIM: tl.constexpr):
    """(BLOCK, DIM / 2) float32: the rows of cos or sin that belong to tokens `lines`."""
    half = tl.arange(0, DIM // 2)
    places = lines.to(tl.int64) * step
    return tl.load(table + places[:, None] * (DIM // 2) + half[None, :], mask=lines[:, None] < tokens, other=0.0)


@triton.jit
def average_turned(
    x, weight, inverse, cos, sin, mean, batch_stride, token_stride, heads, tokens, eps, samples, step,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """mean (B, H, D) float32: the average of every `step`th token of one head, normed and turned."""
    head, batch = tl.program_id(0), tl.program_id(1)
    lines = tl.arange(0, BLOCK)
    x += batch.to(tl.int64) * batch_stride
    inverse += batch.to(tl.int64) * tokens
    c, s = turns(cos, lines, samples, step, DIM), turns(sin, lines, samples, step, DIM)
    tile = normed_and_turned(
        x, weight, inverse, c, s, lines, samples, token_stride, eps, head, step, BLOCK, DIM, PER_HEAD
    )
    tl.store(mean + (batch * heads + head) * DIM + tl.arange(0, DIM), tl.sum(tile, 0) / samples)


@triton.jit
def quantize_turned(
    x, weight, inverse, cos, sin, mean, values, scales, batch_stride, token_stride, heads, tokens, scales_each, eps,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr, PER_TOKEN: tl.constexpr, SMOOTH: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """x (B, L, H * D) -> values (B, H, L, D), scales (B, H, scales_each): EACH heads of one block of tokens."""
    first, block, batch = tl.program_id(0) * EACH, tl.program_id(1), tl.program_id(2)
    lines = block * BLOCK + tl.arange(0, BLOCK)
    x += batch.to(tl.int64) * batch_stride
    inverse += batch.to(tl.int64) * tokens
    c, s = turns(cos, lines, tokens, 1, DIM), turns(sin, lines, tokens, 1, DIM)
    for head in range(first, tl.minimum(first + EACH, heads)):
        tile = normed_and_turned(
            x, weight, inverse, c, s, lines, tokens, token_stride, eps, head, 1, BLOCK, DIM, PER_HEAD
        )
        plane = batch * heads + head
        if SMOOTH:
            centre = tl.load(mean + plane * DIM + tl.arange(0, DIM))
            tile = tl.where(lines[:, None] < tokens, tile - centre[None, :], 0.0)
        store_rounded(tile, values, scales, plane, block, tokens, scales_each, BLOCK, DIM, PER_TOKEN)


@triton.jit
def quantize_queries(
    x, weight, cos, sin, values, scales, batch_stride, token_stride, heads, tokens, eps,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """x (B, L, H * D) -> values (B, H, L, D), scales (B, H, L), GROUP heads at a time.

    The norm is over all channels, so those of BLOCK tokens are read twice, the second time from the cache.
    """
    batch = tl.program_id(1)
    lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lines < tokens
    rows = x + batch.to(tl.int64) * batch_stride + lines.to(tl.int64)[:, None] * token_stride
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, heads, GROUP):
        channels = first * DIM + tl.arange(0, GROUP * DIM)
        here = inside[:, None] & (channels < heads * DIM)[None, :]
        part = tl.load(rows + channels[None, :], mask=here, other=0.0).to(tl.float32)
        squares += tl.sum(part * part, 1)
    scale = 1 / tl.sqrt(squares / (heads * DIM) + eps)
    c, s = turns(cos, lines, tokens, 1, DIM)[:, None, :], turns(sin, lines, tokens, 1, DIM)[:, None, :]
    for first in range(0, heads, GROUP):
        channels = first * DIM + tl.arange(0, GROUP * DIM)
        here = inside[:, None] & (channels < heads * DIM)[None, :]
        gain = tl.load(weight + channels, mask=channels < heads * DIM, other=0.0).to(tl.float32)
        part = tl.load(rows + channels[None, :], mask=here, other=0.0).to(tl.float32) * scale[:, None] * gain[None, :]
        even, odd = tl.split(part.reshape(BLOCK, GROUP, DIM // 2, 2))
        turned = tl.join(even * c - odd * s, even * s + odd * c).reshape(BLOCK, GROUP, DIM)
        whole, step = rounded(turned, magnitude(turned, 2)[:, :, None])
        head = first + tl.arange(0, GROUP)
        places = ((batch * heads + head).to(tl.int64)[None, :] * tokens + lines[:, None])[:, :, None]
        kept = (inside[:, None] & (head < heads)[None, :])[:, :, None]
        tl.store(scales + places, step, mask=kept)
        tl.store(values + places * DIM + tl.arange(0, DIM)[None, None, :], whole, mask=kept)


def quantize(q: Tensor, k: Tensor, block: int) -> Tokens8:
    """q (B, L, H, D), k (B, S, H, D) -> both in int8; `block` keys share a scale."""
    centre = k[:, :: _step(k.shape[1])].mean(1, dtype=torch.float32).contiguous()
    return Tokens8(*_heads(q, None, block), *_heads(k, centre, block), block)


def quantize_rotary(
    q: Tensor,
    k: Tensor,
    norms: tuple[Tensor, Tensor],
    turn: tuple[Tensor, Tensor],
    eps: float,
    head_dim: int,
    block: int,
) -> Tokens8:
    """q, k (B, L, H * D), norms: their RMS weights, (H * D,) or (D,), turn: cos, sin (L, D / 2) float32 -> in int8."""
    return Tokens8(
        *_turned(q, norms[0], turn, eps, head_dim, block, smooth=False),
        *_turned(k, norms[1], turn, eps, head_dim, block, smooth=True),
        block,
    )


def _step(tokens: int) -> int:
    # Odd, so that no power of two in the width of a frame makes all samples one column of the picture.
    return max(1, tokens // SAMPLES) | 1


def _heads(x: Tensor, centre: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens, heads, dim = x.shape
    blocks = triton.cdiv(tokens, block)
    each = tokens if centre is None else blocks + 1
    values = torch.empty(batch, heads, tokens, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, each, dtype=torch.float32, device=x.device)
    quantize_heads[(blocks, heads, batch)](
        x, x if centre is None else centre, values, scales, x.stride(0), x.stride(1), x.stride(2), heads, tokens, each,
        BLOCK=block, DIM=dim, PER_TOKEN=centre is None, SMOOTH=centre is not None, num_warps=4 if block <= 64 else 8,
    )  # fmt: skip
    return values, scales


def _turned(
    x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor], eps: float, dim: int, block: int, *, smooth: bool
) -> tuple[Tensor, Tensor]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, tokens, channels = x.shape
    heads, blocks = channels // dim, triton.cdiv(tokens, block)
    each = blocks + 1 if smooth else tokens
    values = torch.empty(batch, heads, tokens, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, each, dtype=torch.float32, device=x.device)
    cos, sin = (table.contiguous() for table in turn)
    per_head = weight.shape[0] == dim and heads > 1
    if not smooth and not per_head:
        quantize_queries[(triton.cdiv(tokens, TOKENS), batch)](
            x, weight, cos, sin, values, scales, x.stride(0), x.stride(1), heads, tokens, eps,
            BLOCK=TOKENS, GROUP=HEADS_EACH, DIM=dim, num_warps=4,
        )  # fmt: skip
        return values, scales
    inverse = centre = scales  # where a kernel does not read it, any address will do
    if not per_head:
        inverse = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
        width = triton.next_power_of_2(channels)
        inverse_rms[(tokens, batch)](
            x, inverse, x.stride(0), x.stride(1), tokens, eps, CHANNELS=channels, BLOCK=width, num_warps=4
        )
    if smooth:
        centre = torch.empty(batch, heads, dim, dtype=torch.float32, device=x.device)
        step = _step(tokens)
        samples = triton.cdiv(tokens, step)
        average_turned[(heads, batch)](
            x, weight, inverse, cos, sin, centre, x.stride(0), x.stride(1), heads, tokens, eps, samples, step,
            BLOCK=triton.next_power_of_2(samples), DIM=dim, PER_HEAD=per_head, num_warps=8,
        )  # fmt: skip
    quantize_turned[(triton.cdiv(heads, HEADS_EACH), blocks, batch)](
        x, weight, inverse, cos, sin, centre, values, scales, x.stride(0), x.stride(1), heads, tokens, each, eps,
        BLOCK=block, DIM=dim, PER_HEAD=per_head, PER_TOKEN=not smooth, SMOOTH=smooth, EACH=HEADS_EACH,
        num_warps=8,
    )  # fmt: skip
    return values, scales
