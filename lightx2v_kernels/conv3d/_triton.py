"""Implicit GEMM over channels-last frames.

In memory a line of pixels is one run of numbers, so the kw pixels under one row of the kernel are a run of kw C numbers
that starts at the first of them. The matrix A of the product has such runs side by side, kt kh of them, for every
place; nothing of it is stored.
"""

import importlib
from dataclasses import astuple
from functools import partial
from typing import Any, Sequence  # noqa: UP035 (PyTorch 2.6 knows no other in a schema)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.conv3d import reference
from lightx2v_kernels.conv3d._tiles import Tiles, chosen, cover
from lightx2v_kernels.conv_input._triton import direct

LEAST = 8  # channels, or a multiple of them: a pixel is then read 16 bytes at a time


# Compiled once a layer, not again for each size of frames.
@triton.jit(do_not_specialize=["frames", "height", "width"])
def _conv3d(
    x,  # (B, t, H', W', C) contiguous
    past,  # (B, kt - 1, H', W', C) contiguous
    weight,  # (O, kt kh kw C) contiguous
    bias,
    residual,  # (B, t, H, W, O) contiguous
    out,  # the same
    frames,
    height,
    width,
    C: tl.constexpr,
    OUT: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    DOUBLED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MORE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
):
    # Frames vary fastest: programs that run together share the frames that their kernels overlap in.
    number = tl.program_id(0)
    frame = number % frames
    batch = tl.program_id(2).to(tl.int64)
    # DOUBLED: x has a pixel on every side, and there is a kernel and a quarter of the result for each phase (0 or 1) of
    # its rows and columns.
    out_height = height - (2 if DOUBLED else KH - 1)
    out_width = width - (2 if DOUBLED else KW - 1)
    phase = tl.program_id(1) % 4 if DOUBLED else 0
    if LINES > 1:
        SIDE: tl.constexpr = BLOCK_M // LINES
        across, inside_tile = tl.cdiv(out_width, SIDE), tl.arange(0, BLOCK_M)
        tall = number // frames // across * LINES + inside_tile // SIDE
        wide = number // frames % across * SIDE + inside_tile % SIDE
        kept = (tall < out_height) & (wide < out_width)
        places = tall * out_width + wide
        held = tl.minimum(tall, out_height - 1) * out_width + tl.minimum(wide, out_width - 1)
    else:
        places = (number // frames) * BLOCK_M + tl.arange(0, BLOCK_M)
        kept = places < out_height * out_width
        held = tl.minimum(places, out_height * out_width - 1)
    first = tl.program_id(1) // (4 if DOUBLED else 1) * (BLOCK_N + MORE_N)
    RUN: tl.constexpr = KW * C
    STEPS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K

    inner = tl.arange(0, BLOCK_K)
    frame_size = height * width * C
    from_x = x + (batch * frames + frame) * frame_size + (phase // 2 * width + phase % 2) * C
    weight += phase * (OUT * KT * KH * RUN)
    from_past = past + (batch * (KT - 1) + frame) * frame_size
    a_at = ((held // out_width) * width + held % out_width)[:, None] * C + inner[None, :]
    columns = first + tl.arange(0, BLOCK_N)
    b_at = tl.minimum(columns, OUT - 1)[None, :] * (KT * KH * RUN) + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MORE_N > 0:
        more_columns = first + BLOCK_N + tl.arange(0, MORE_N)
        more_at = tl.minimum(more_columns, OUT - 1)[None, :] * (KT * KH * RUN) + inner[:, None]
        more = tl.zeros((BLOCK_M, MORE_N), tl.float32)

    missing = tl.maximum(KT - 1 - frame, 0)  # frames under the kernel that lie before x
    start = 0 if PAST else missing * (KH * STEPS)  # zeros add nothing
    for step in tl.range(start, KT * KH * STEPS, num_stages=STAGES):
        tap = step // STEPS
        time = tap // KH
        inside = (step % STEPS) * BLOCK_K
        source = from_x + (time - (KT - 1)) * frame_size
        if PAST:
            source = tl.where(time < missing, from_past + time * frame_size, source)
        source += (tap % KH) * (width * C) + inside
        taken = weight + tap * RUN + inside
        if RUN % BLOCK_K:  # the last step of a run ends beyond it
            a = tl.load(source + a_at, mask=(inside + inner < RUN)[None, :], other=0.0)
            b = tl.load(taken + b_at, mask=(inside + inner < RUN)[:, None], other=0.0)
        else:
            a = tl.load(source + a_at)
            b = tl.load(taken + b_at)
        total = tl.dot(a, b, total)
        if MORE_N > 0:
            if RUN % BLOCK_K:
                b = tl.load(taken + more_at, mask=(inside + inner < RUN)[:, None], other=0.0)
            else:
                b = tl.load(taken + more_at)
            more = tl.dot(a, b, more)

    at = (batch * frames + frame) * out_height * out_width + places
    if DOUBLED:
        row = (batch * frames + frame) * (2 * out_height) + places // out_width * 2 + phase // 2
        at = row * (2 * out_width) + places % out_width * 2 + phase % 2
    _store(total, bias, residual, out, at, kept, columns, OUT, RESIDUAL, RELU)
    if MORE_N > 0:
        _store(more, bias, residual, out, at, kept, more_columns, OUT, RESIDUAL, RELU)


@triton.jit
def _store(
    total, bias, residual, out, at, kept, columns, OUT: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr
):  # fmt: skip
    mask = kept[:, None] & (columns < OUT)[None, :]
    to = at[:, None] * OUT + columns[None, :]
    total += tl.load(bias + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        total += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)


def run(
    rows: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, beside: Tensor | None, out: Tensor,
    kernel: tuple[int, int, int], how: Tiles, relu: bool,
) -> None:  # fmt: skip
    """Fills out (B, t, H, W, O) from rows (B, t, H', W', C), what is before and beside them in the same order.
    weight: (O, kt, kh, kw, C), or for doubled frames by phase (2, 2, O, 2, 2, C)."""
    (b, t, h, w, c), o, (kt, kh, kw) = rows.shape, out.shape[4], kernel
    doubled = weight.ndim == 6
    high, wide = (h - 2, w - 2) if doubled else (h - kh + 1, w - kw + 1)
    channels = triton.cdiv(o, how.channels + how.more_channels) * (4 if doubled else 1)
    given = (rows, rows if before is None else before, weight, bias, out if beside is None else beside, out, t, h, w)
    more = dict(C=c, OUT=o, KT=kt, KH=kh, KW=kw, PAST=before is not None and kt > 1, RESIDUAL=beside is not None)
    more |= dict(RELU=relu, DOUBLED=doubled, BLOCK_M=how.places, BLOCK_N=how.channels, MORE_N=how.more_channels)
    grid = (cover(high, wide, how) * t, channels, b)
    if how.straight:
        importlib.import_module("lightx2v_kernels.conv3d._gluon").run(grid, given, more, how)
    else:
        more |= dict(BLOCK_K=how.depth, STAGES=how.stages, LINES=how.lines)
        _conv3d[grid](*given, **more, num_warps=how.warps)


def _launch(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    how: Sequence[int],
) -> Tensor:
    (b, _, t, h, w), (o, _, kt, kh, kw) = x.shape, weight.shape
    before, beside = (None if a is None else rows_of(a) for a in (past, residual))
    out = torch.empty((b, t, h - kh + 1, w - kw + 1, o), dtype=x.dtype, device=x.device)
    *sizes, straight = how
    made = Tiles(*sizes, straight=bool(straight))  # type: ignore[misc, arg-type]
    run(rows_of(x), before, rows_of(weight), bias, beside, out, (kt, kh, kw), made, relu)
    return out.permute(0, 4, 1, 2, 3)


def rows_of(x: Tensor) -> Tensor:
    """(B, C, t, H, W) -> (B, t, H, W, C) contiguous: a view of what is channels last."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


_opaque = torch.library.custom_op("lightx2v::conv3d", _launch, mutates_args=())


@_opaque.register_fake
def _(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    how: Sequence[int],
) -> Tensor:
    (b, _, t, h, w), (o, _, _, kh, kw) = x.shape, weight.shape
    return x.new_empty(b, t, h - kh + 1, w - kw + 1, o).permute(0, 4, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.relu = inputs[5]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: list[Any] = [None if a is None else a.detach().requires_grad_() for a in ctx.saved_tensors]
    with torch.enable_grad():
        out = partial(reference.conv3d, relu=ctx.relu)(*saved)
    given = [a for a in saved if a is not None]
    found = iter(torch.autograd.grad(out, given, grad, allow_unused=True))
    return (*(None if a is None else next(found) for a in saved), None, None)


_opaque.register_autograd(_backward, setup_context=_setup)


def conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool = False,
    how: Tiles | None = None,
) -> Tensor:
    """See the contract in `__init__`. how: other tiles than `chosen`, for measuring."""
    if short := -weight.shape[1] % LEAST:
        more = (0, 0, 0, 0, 0, 0, 0, short)
        x, weight = F.pad(x, more), F.pad(weight, more)
        past = None if past is None else F.pad(past, more)
    o, c, kt, kh, kw = weight.shape
    fields = [int(value) for value in astuple(how or chosen(c, o, (kt, kh, kw), x.device))]
    out: Tensor = direct(_launch, _opaque)(x, past, weight, bias, residual, relu, fields)
    return out
