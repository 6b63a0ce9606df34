"""RMS norm and rotary embedding of a few whole tokens a program: the weights are read once for all of them."""

import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels import tiles
from lightx2v_kernels.norm_rope import reference
from lightx2v_kernels.opaque import opaque


@triton.jit(do_not_specialize=["length"])
def _norm_rope(
    x,  # (B, L, H * D)
    weight,  # (H * D,) | (D,)
    cos,  # (L, D / 2)
    sin,
    out,  # (B, L, H, D)
    length,
    eps,
    x_sample,
    x_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    per_sample = tl.cdiv(length, ROWS)
    sample = (tl.program_id(0) // per_sample).to(tl.int64)
    row = (tl.program_id(0) % per_sample).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_DIM)
    pair = tl.arange(0, BLOCK_DIM // 2)
    row_mask = row < length
    head_mask = (head < HEADS)[:, None] & (channel < DIM)[None, :]
    mask = row_mask[:, None, None] & head_mask[None, :, :]
    within = head[:, None] * DIM + channel[None, :]

    tokens = x + sample * x_sample + row[:, None, None] * x_token + within[None, :, :]
    value = tl.load(tokens, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    squares = tl.sum(value * value, 2)
    if PER_HEAD:
        scale = tl.load(weight + channel, mask=channel < DIM, other=0.0, eviction_policy="evict_last")[None, None, :]
        value *= tl.rsqrt(squares / DIM + eps)[:, :, None]
    else:
        scale = tl.load(weight + within, mask=head_mask, other=0.0, eviction_policy="evict_last")[None, :, :]
        value *= tl.rsqrt(tl.sum(squares, 1) / (HEADS * DIM) + eps)[:, None, None]
    value *= scale.to(tl.float32)

    angle = row[:, None] * (DIM // 2) + pair[None, :]
    angle_mask = row_mask[:, None] & (pair < DIM // 2)[None, :]
    c = tl.load(cos + angle, mask=angle_mask, other=0.0)[:, None, :]
    s = tl.load(sin + angle, mask=angle_mask, other=0.0)[:, None, :]
    even, odd = tl.split(tl.reshape(value, (ROWS, BLOCK_HEADS, BLOCK_DIM // 2, 2)))
    turned = tl.join(even * c - odd * s, even * s + odd * c).to(out.dtype.element_ty)
    written = (sample * length + row)[:, None, None] * (HEADS * DIM) + within[None, :, :]
    tl.store(out + written, tl.reshape(turned, (ROWS, BLOCK_HEADS, BLOCK_DIM)), mask=mask)


def _launch(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = _empty(x, weight, cos)
    batch, length, heads, head_dim = out.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    tile = tiles.whole_rows(tiles.power_of_two(heads) * tiles.power_of_two(head_dim))
    if x.numel():
        _norm_rope[(batch * tiles.count(length, tile.rows),)](
            x,
            weight.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            out,
            length,
            eps,
            *x.stride()[:2],
            HEADS=heads,
            DIM=head_dim,
            PER_HEAD=len(weight) == head_dim,
            ROWS=tile.rows,
            BLOCK_HEADS=tiles.power_of_two(heads),
            BLOCK_DIM=tiles.power_of_two(head_dim),
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return out


def _empty(x: Tensor, weight: Tensor, cos: Tensor, *_: object) -> Tensor:
    batch, length, width = x.shape
    head_dim = 2 * cos.shape[-1]
    return x.new_empty(batch, length, width // head_dim, head_dim)


norm_rope = opaque("norm_rope", _launch, _empty, reference.norm_rope)
