"""Implicit GEMM over channels-last frames.

In memory a line of pixels is one run of numbers, so the kw pixels under one row of the kernel are a run of kw C numbers
that starts at the first of them. The matrix A of the product has such runs side by side, kt kh of them, for every
place; nothing of it is stored.
"""

import functools
from dataclasses import dataclass
from typing import Any, Sequence  # noqa: UP035 (PyTorch 2.6 knows no other in a schema)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.conv3d import reference
from lightx2v_kernels.conv_input._triton import direct

LEAST = 8  # channels, or a multiple of them: a pixel is then read 16 bytes at a time

SIZES = ((128, 128, 64), (128, 128, 0), (256, 64, 32), (128, 128, 32))  # places and channels, for more than 64


@dataclass(frozen=True)
class Tiles:
    """places and channels: of one program's output; the channels in two products that share A, the second may be 0.
    depth: of one step along K. stages: steps in flight. warps: of 32 threads."""

    places: int
    channels: int
    more_channels: int
    depth: int
    stages: int
    warps: int


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
    DOUBLED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MORE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
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
    _store(total, bias, residual, out, at, kept, columns, OUT, RESIDUAL)
    if MORE_N > 0:
        _store(more, bias, residual, out, at, kept, more_columns, OUT, RESIDUAL)


@triton.jit
def _store(total, bias, residual, out, at, kept, columns, OUT: tl.constexpr, RESIDUAL: tl.constexpr):
    mask = kept[:, None] & (columns < OUT)[None, :]
    to = at[:, None] * OUT + columns[None, :]
    total += tl.load(bias + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        total += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)


def tiles(channels: int, out_channels: int, kernel: tuple[int, int, int], memory: int) -> Tiles:
    """The tiles for a layer. memory: bytes that the threads of one program may share."""
    size = (128, max(16, triton.next_power_of_2(out_channels)), 0)
    if out_channels > 64:
        size = min(SIZES, key=lambda size: -out_channels % sum(size[1:]))
    run = kernel[2] * channels

    def held(depth: int) -> int:
        """Steps that fit."""
        return min(4 if depth == 64 else 5, memory // (2 * sum(size) * depth))

    # A step costs its depth, filled or not, and about as much again as a depth of 8.
    depths = [depth for depth in (32, 64, 16) if held(depth) >= 3]
    depth = min(depths, key=lambda depth: -(-run // depth) * (depth + 8))
    return Tiles(*size, depth, held(depth), 4 if out_channels <= 64 else 8)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the threads of one program may share: 227 KiB on an H100, 99 KiB on consumer GPUs."""
    if device.type != "cuda":
        return 232448
    size: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return size


def _launch(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None, how: Sequence[int]
) -> Tensor:
    made = Tiles(*how)
    (b, c, t, h, w), (o, _, kt, kh, kw) = x.shape, weight.shape
    rows, before, beside = (None if a is None else rows_of(a) for a in (x, past, residual))
    shape = (b, t, h - kh + 1, w - kw + 1, o)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(shape[2] * shape[3], made.places) * t, triton.cdiv(o, made.channels + made.more_channels), b)
    _conv3d[grid](
        rows, rows if before is None else before, rows_of(weight), bias, out if beside is None else beside, out,
        t, h, w, C=c, OUT=o, KT=kt, KH=kh, KW=kw,
        PAST=past is not None and kt > 1, RESIDUAL=residual is not None, DOUBLED=False,
        BLOCK_M=made.places, BLOCK_N=made.channels, MORE_N=made.more_channels, BLOCK_K=made.depth, STAGES=made.stages,
        num_warps=made.warps,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


def rows_of(x: Tensor) -> Tensor:
    """(B, C, t, H, W) -> (B, t, H, W, C) contiguous: a view of what is channels last."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


_opaque = torch.library.custom_op("lightx2v::conv3d", _launch, mutates_args=())


@_opaque.register_fake
def _(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None, how: Sequence[int]
) -> Tensor:
    (b, _, t, h, w), (o, _, _, kh, kw) = x.shape, weight.shape
    return x.new_empty(b, t, h - kh + 1, w - kw + 1, o).permute(0, 4, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: list[Any] = [None if a is None else a.detach().requires_grad_() for a in ctx.saved_tensors]
    with torch.enable_grad():
        out = reference.conv3d(*saved)
    given = [a for a in saved if a is not None]
    found = iter(torch.autograd.grad(out, given, grad, allow_unused=True))
    return (*(None if a is None else next(found) for a in saved), None)


_opaque.register_autograd(_backward, setup_context=_setup)


def conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    how: Tiles | None = None,
) -> Tensor:
    """See the contract in `__init__`. how: other tiles than those of `tiles`, for measuring."""
    if short := -weight.shape[1] % LEAST:
        more = (0, 0, 0, 0, 0, 0, 0, short)
        x, weight = F.pad(x, more), F.pad(weight, more)
        past = None if past is None else F.pad(past, more)
    o, c, kt, kh, kw = weight.shape
    how = how or tiles(c, o, (kt, kh, kw), shared_memory(x.device))
    fields = [how.places, how.channels, how.more_channels, how.depth, how.stages, how.warps]
    out: Tensor = direct(_launch, _opaque)(x, past, weight, bias, residual, fields)
    return out
