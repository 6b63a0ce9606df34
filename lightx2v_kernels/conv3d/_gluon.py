"""The same convolution for few channels, in Gluon, Triton's lower-level language, in which layouts are written.

With 24 or 48 channels a number of A meets so few of B that the tensor cores wait for it: on its way through shared
memory it is written and read once for each place of the kernel. Here each thread loads the 16 bytes that its part of
the product takes straight into registers, and what neighbours read again comes from the multiprocessor's cache. Which
numbers of K a thread holds does not matter to the sum where A and B agree: eight side by side in place of the four
pairs that the instruction names.
K runs over all rows of the kernel in one frame, in steps of 32; only the last step of a frame ends beyond it.
"""

import math
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from lightx2v_kernels.conv3d._tiles import Tiles

STEP = gl.constexpr(32)  # numbers of K: eight for each of the four threads that share a row


@gluon.jit
def frames_at(
    from_x, from_past, missing, frame_size, width, a_at, step,
    C: gl.constexpr, KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, PAST: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(places, STEP) of A. Beyond the kernel's last row it begins again, where B has zeros."""
    RUN: gl.constexpr = KW * C
    K: gl.constexpr = KH * RUN
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    time = step // STEPS
    k = step % STEPS * STEP + gl.arange(0, STEP, layout=gl.SliceLayout(0, LAYOUT))
    source = from_x + (time - (KT - 1)) * frame_size
    if PAST:
        source = gl.where(time < missing, from_past + time * frame_size, source)
    offset = k // RUN * (width * C) + k % RUN
    if K % STEP:
        offset = gl.where(k < K, offset, k - K)
    at = (source + offset)[None, :] + a_at[:, None]
    if not PAST and KT > 1:
        return gl.load(at, mask=(time >= missing), other=0.0)
    return gl.load(at)


@gluon.jit
def weights_at(
    weight, columns, step, C: gl.constexpr, KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """(STEP, channels) of B, alike; zeros beyond the kernel's last row."""
    K: gl.constexpr = KH * KW * C
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    k = step % STEPS * STEP + gl.arange(0, STEP, layout=gl.SliceLayout(1, LAYOUT))
    at = (weight + step // STEPS * K + k)[:, None] + (columns * (KT * K))[None, :]
    if K % STEP:
        return gl.load(at, mask=(k < K)[:, None], other=0.0)
    return gl.load(at)


@gluon.jit
def finish(
    total, bias, residual, out, at, kept, first, OUT: gl.constexpr, N: gl.constexpr, RESIDUAL: gl.constexpr,
    RELU: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Bias, residual, ReLU and the store, in a layout in which a thread has up to eight channels side by side."""
    total = gl.convert_layout(total, ROWS)
    columns = first + gl.arange(0, N, layout=gl.SliceLayout(0, ROWS))
    mask = kept[:, None] & (columns < OUT)[None, :]
    to = at[:, None] * OUT + columns[None, :]
    total += gl.load(bias + columns, mask=columns < OUT, other=0.0).to(gl.float32)[None, :]
    if RESIDUAL:
        total += gl.load(residual + to, mask=mask, other=0.0).to(gl.float32)
    if RELU:
        total = gl.where(total < 0.0, 0.0, total)  # NaN stays
    gl.store(out + to, total.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def place(number, out_height, out_width, M: gl.constexpr, LINES: gl.constexpr, LAYOUT: gl.constexpr):
    """Line and column of each place of a rectangle."""
    SIDE: gl.constexpr = M // LINES
    across, inside = gl.cdiv(out_width, SIDE), gl.arange(0, M, layout=LAYOUT)
    return number // across * LINES + inside // SIDE, number % across * SIDE + inside % SIDE


@gluon.jit(do_not_specialize=["frames", "height", "width"])
def convolve(
    x,  # (B, t, H', W', C) contiguous
    past,  # (B, kt - 1, H', W', C) contiguous
    weight,  # (O, kt kh kw C) contiguous
    bias,
    residual,  # (B, t, H, W, O) contiguous
    out,  # the same
    frames,
    height,
    width,
    C: gl.constexpr,
    OUT: gl.constexpr,
    KT: gl.constexpr,
    KH: gl.constexpr,
    KW: gl.constexpr,
    PAST: gl.constexpr,
    RESIDUAL: gl.constexpr,
    RELU: gl.constexpr,
    DOUBLED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MORE_N: gl.constexpr,
    LINES: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    # See _triton.py, which has the same order of programs and the same meaning of DOUBLED.
    WARPS: gl.constexpr = gl.num_warps()
    SUM: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, SUM, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, SUM, 8)
    K: gl.constexpr = KH * KW * C
    number = gl.program_id(0)
    frame = number % frames
    batch = gl.program_id(2).to(gl.int64)
    phase = gl.program_id(1) % 4 if DOUBLED else 0
    first = gl.program_id(1) // (4 if DOUBLED else 1) * (BLOCK_N + MORE_N)
    out_height = height - (2 if DOUBLED else KH - 1)
    out_width = width - (2 if DOUBLED else KW - 1)

    line, column = place(number // frames, out_height, out_width, BLOCK_M, LINES, gl.SliceLayout(1, A))
    a_at = (gl.minimum(line, out_height - 1) * width + gl.minimum(column, out_width - 1)) * C
    columns = gl.minimum(first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, B)), OUT - 1)
    frame_size = height * width * C
    from_x = x + (batch * frames + frame) * frame_size + (phase // 2 * width + phase % 2) * C
    from_past = past + (batch * (KT - 1) + frame) * frame_size
    weight += phase * (OUT * KT * K)
    total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SUM)
    if MORE_N > 0:
        more_columns = gl.minimum(first + BLOCK_N + gl.arange(0, MORE_N, layout=gl.SliceLayout(0, B)), OUT - 1)
        more = gl.zeros([BLOCK_M, MORE_N], gl.float32, SUM)

    missing = gl.maximum(KT - 1 - frame, 0)  # frames under the kernel that lie before x
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    start = 0 if PAST else missing * STEPS // AT_ONCE  # zeros add nothing
    for several in range(start, KT * STEPS // AT_ONCE):
        for one in gl.static_range(AT_ONCE):
            step = several * AT_ONCE + one
            a = frames_at(from_x, from_past, missing, frame_size, width, a_at, step, C, KT, KH, KW, PAST, A)
            total = mma_v2(a, weights_at(weight, columns, step, C, KT, KH, KW, B), total)
            if MORE_N > 0:
                more = mma_v2(a, weights_at(weight, more_columns, step, C, KT, KH, KW, B), more)

    PART: gl.constexpr = BLOCK_N // 8 if BLOCK_N < 64 else 8
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // PART, PART], [WARPS, 1], [1, 0])
    line, column = place(number // frames, out_height, out_width, BLOCK_M, LINES, gl.SliceLayout(1, ROWS))
    kept = (line < out_height) & (column < out_width)
    if DOUBLED:
        row = (batch * frames + frame) * (2 * out_height) + line * 2 + phase // 2
        to = row * (2 * out_width) + column * 2 + phase % 2
    else:
        to = ((batch * frames + frame) * out_height + line) * out_width + column
    finish(total, bias, residual, out, to, kept, first, OUT, BLOCK_N, RESIDUAL, RELU, ROWS)
    if MORE_N > 0:
        MORE: gl.constexpr = MORE_N // 8 if MORE_N < 64 else 8
        MORE_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // MORE, MORE], [WARPS, 1], [1, 0])
        to = gl.convert_layout(to, gl.SliceLayout(1, MORE_ROWS))
        kept = gl.convert_layout(kept, gl.SliceLayout(1, MORE_ROWS))
        finish(more, bias, residual, out, to, kept, first + BLOCK_N, OUT, MORE_N, RESIDUAL, RELU, MORE_ROWS)


def run(grid: tuple[int, ...], given: tuple[Any, ...], more: dict[str, Any], how: Tiles) -> None:
    """See `_triton.run`, which has prepared the arguments."""
    steps = more["KT"] * triton.cdiv(more["KH"] * more["KW"] * more["C"], STEP.value)
    convolve[grid](*given, **more, LINES=how.lines, AT_ONCE=math.gcd(steps, how.stages), num_warps=how.warps)
