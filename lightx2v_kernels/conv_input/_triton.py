"""One program makes a run of pixels of one line of one padded frame."""

from collections.abc import Callable
from typing import Any, Sequence  # noqa: UP035 (PyTorch 2.6 knows no other in a schema)

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels.conv_input import reference

ELEMENTS = 4096  # pixels x channels of one program


# Compiled once a layer, not again for each size of frames.
@triton.jit(do_not_specialize=["frames", "height", "width", "out_height", "out_width"])
def _line(
    x,  # (B, t, H, W, C) by strides, C contiguous
    gamma,
    out,  # (B, t, H', W', C) contiguous
    frames,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_frame,
    x_row,
    x_column,
    C: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    SCALE: tl.constexpr,
    ROOT_C: tl.constexpr,
    NORM: tl.constexpr,
    REPLICATE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    row = line % out_height
    frame = (line // out_height) % frames
    batch = line // (out_height * frames)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    channels = tl.arange(0, BLOCK_C)
    inside = (columns < out_width)[:, None] & (channels < C)[None, :]

    # The pixel that each place shows; at the edges the nearest one, which zeros replace unless it is to go on.
    y = tl.minimum(tl.maximum(row - PAD_H, 0) // SCALE, height - 1)
    z = tl.minimum(tl.maximum(columns - PAD_W, 0) // SCALE, width - 1)
    known = inside
    if not REPLICATE:
        beyond = (row < PAD_H) | (row >= height * SCALE + PAD_H)
        beside = (columns < PAD_W) | (columns >= width * SCALE + PAD_W)
        known = inside & ((beyond | beside) == 0)[:, None]
    source = x + batch.to(tl.int64) * x_batch + frame.to(tl.int64) * x_frame + y.to(tl.int64) * x_row
    value = tl.load(source + z[:, None] * x_column + channels[None, :], mask=known, other=0.0)
    if NORM:
        wide = value.to(tl.float32)
        weight = tl.load(gamma + channels, mask=channels < C, other=0.0).to(tl.float32)
        wide *= (tl.rsqrt(tl.sum(wide * wide, 1) + 1e-24) * ROOT_C)[:, None]
        wide *= weight[None, :]
        value = (wide * tl.sigmoid(wide)).to(value.dtype)
    to = out + line.to(tl.int64) * out_width * C
    tl.store(to + columns[:, None] * C + channels[None, :], value, mask=inside)


def _launch(x: Tensor, gamma: Tensor | None, padding: Sequence[int], replicate: bool, scale: int) -> Tensor:
    rows = x.permute(0, 2, 3, 4, 1)
    rows = rows if rows.stride(4) == 1 else rows.contiguous()
    b, t, h, w, c = rows.shape
    pad_h, pad_w = padding
    shape = (b, t, scale * h + 2 * pad_h, scale * w + 2 * pad_w, c)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    block_c = triton.next_power_of_2(c)
    block_w = max(1, min(ELEMENTS // block_c, triton.next_power_of_2(shape[3])))
    _line[(b * t * shape[2], triton.cdiv(shape[3], block_w))](
        rows, x if gamma is None else gamma, out, t, h, w, *shape[2:4], *rows.stride()[:4],
        C=c, PAD_H=pad_h, PAD_W=pad_w, SCALE=scale, ROOT_C=c**0.5, NORM=gamma is not None, REPLICATE=replicate,
        BLOCK_W=block_w, BLOCK_C=block_c,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


_opaque = torch.library.custom_op("lightx2v::conv_input", _launch, mutates_args=())


@_opaque.register_fake
def _(x: Tensor, gamma: Tensor | None, padding: Sequence[int], replicate: bool, scale: int) -> Tensor:
    (b, c, t, h, w), (pad_h, pad_w) = x.shape, padding
    return x.new_empty(b, t, scale * h + 2 * pad_h, scale * w + 2 * pad_w, c).permute(0, 4, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, *ctx.rest = inputs
    ctx.save_for_backward(x, gamma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: list[Any] = [None if a is None else a.detach().requires_grad_() for a in ctx.saved_tensors]
    with torch.enable_grad():
        out = reference.conv_input(*saved, *ctx.rest)
    found = iter(torch.autograd.grad(out, [a for a in saved if a is not None], grad))
    return (*(None if a is None else next(found) for a in saved), None, None, None)


_opaque.register_autograd(_backward, setup_context=_setup)


def direct(launch: Callable[..., Tensor], opaque: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The launch itself, unless something has to see one opaque op: what differentiates, compiles or traces.

    The way through PyTorch's dispatcher takes the host about as long as the launch.
    """
    return opaque if torch.is_grad_enabled() or torch.compiler.is_compiling() else launch


def conv_input(x: Tensor, gamma: Tensor | None, padding: tuple[int, int], replicate: bool, scale: int) -> Tensor:
    """See the contract in `__init__`."""
    out: Tensor = direct(_launch, _opaque)(x, gamma, list(padding), replicate, scale)
    return out
