"""One program makes a run of pixels of one line of one padded frame."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.conv_input import reference

ELEMENTS = 4096  # pixels x channels of one program


@triton.jit
def _line(
    x,  # (B, t, H, W, C) by strides, C contiguous
    gamma,
    past,  # (B, p, H', W', C) by strides
    out,  # (B, p + t, H', W', C) contiguous
    lead,
    height,
    width,
    out_frames,
    out_height,
    out_width,
    x_batch,
    x_frame,
    x_row,
    x_column,
    past_batch,
    past_frame,
    C: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT_C: tl.constexpr,
    NORM: tl.constexpr,
    PAST: tl.constexpr,
    REPLICATE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    row = line % out_height
    frame = (line // out_height) % out_frames
    batch = (line // (out_height * out_frames)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    channels = tl.arange(0, BLOCK_C)
    inside = (columns < out_width)[:, None] & (channels < C)[None, :]
    out_offsets = columns[:, None] * C + channels[None, :]
    to = out + line.to(tl.int64) * out_width * C + out_offsets

    if PAST and frame < lead:
        source = past + batch * past_batch + frame.to(tl.int64) * past_frame + row * (out_width * C)
        tl.store(to, tl.load(source + out_offsets, mask=inside), mask=inside)
    else:
        # The pixel that each place shows; at the edges the nearest one, which zeros replace unless it is to go on.
        y = (row - PAD_H) // SCALE
        y = tl.minimum(tl.maximum(y, 0), height - 1)
        z = tl.maximum(columns - PAD_W, 0) // SCALE
        z = tl.minimum(z, width - 1)
        known = inside
        if not REPLICATE:
            blank = (frame < lead) | (row < PAD_H) | (row >= height * SCALE + PAD_H)
            beside = (columns < PAD_W) | (columns >= width * SCALE + PAD_W)
            known = inside & ((blank | beside) == 0)[:, None]
        source = x + batch * x_batch + tl.maximum(frame - lead, 0).to(tl.int64) * x_frame + y.to(tl.int64) * x_row
        value = tl.load(source + z[:, None] * x_column + channels[None, :], mask=known, other=0.0)
        if NORM:
            wide = value.to(tl.float32)
            weight = tl.load(gamma + channels, mask=channels < C, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 1) + 1e-24) * ROOT_C
            wide = wide * scale[:, None] * weight[None, :]
            value = (wide * tl.sigmoid(wide)).to(value.dtype)
        tl.store(to, value, mask=inside)


@torch.library.custom_op("lightx2v::conv_input", mutates_args=())
def _conv_input(
    x: Tensor, gamma: Tensor | None, past: Tensor | None, padding: list[int], replicate: bool, scale: int
) -> Tensor:
    (b, c, t, h, w), (lead, pad_h, pad_w) = x.shape, padding
    rows = x.permute(0, 2, 3, 4, 1)
    rows = rows if rows.stride(4) == 1 else rows.contiguous()
    shape = (b, lead + t, scale * h + 2 * pad_h, scale * w + 2 * pad_w, c)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    before = out if past is None else past.permute(0, 2, 3, 4, 1)
    if before.stride()[2:] != out.stride()[2:]:
        before = before.contiguous()
    block_c = triton.next_power_of_2(c)
    block_w = max(1, min(ELEMENTS // block_c, triton.next_power_of_2(shape[3])))
    _line[(shape[0] * shape[1] * shape[2], triton.cdiv(shape[3], block_w))](
        rows, x if gamma is None else gamma, before, out, lead, h, w, *shape[1:4], *rows.stride()[:4],
        *before.stride()[:2], C=c, PAD_H=pad_h, PAD_W=pad_w, SCALE=scale, ROOT_C=c**0.5, NORM=gamma is not None,
        PAST=past is not None, REPLICATE=replicate, BLOCK_W=block_w, BLOCK_C=block_c,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


@_conv_input.register_fake
def _(x: Tensor, gamma: Tensor | None, past: Tensor | None, padding: list[int], replicate: bool, scale: int) -> Tensor:
    (b, c, t, h, w), (lead, pad_h, pad_w) = x.shape, padding
    return x.new_empty(b, lead + t, scale * h + 2 * pad_h, scale * w + 2 * pad_w, c).permute(0, 4, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, past, *ctx.rest = inputs
    ctx.save_for_backward(x, gamma, past)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: list[Any] = [None if a is None else a.detach().requires_grad_() for a in ctx.saved_tensors]
    with torch.enable_grad():
        out = reference.conv_input(*saved, *ctx.rest)
    given = [a for a in saved if a is not None]
    found = iter(torch.autograd.grad(out, given, grad))
    return (*(None if a is None else next(found) for a in saved), None, None, None)


_conv_input.register_autograd(_backward, setup_context=_setup)


def conv_input(
    x: Tensor,
    gamma: Tensor | None,
    past: Tensor | None,
    padding: tuple[int, int, int],
    replicate: bool,
    scale: int,
) -> Tensor:
    """See the contract in `__init__`."""
    return _conv_input(x, gamma, past, list(padding), replicate, scale)
