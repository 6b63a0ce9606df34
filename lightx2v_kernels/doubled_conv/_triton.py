"""Four convolutions of 2x2 in place of one of 3x3 on four times the pixels: 16 products for 36.

Of the nine pixels under the kernel, doubled, at most four differ. Where a row of the result is even, the kernel's first
row lies on one pixel's row and the other two on the next; where it is odd, the first two lie on one and the last on the
next. Columns alike. So the weights that lie on the same pixel are added first, in fp32.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from lightx2v_kernels.conv3d._triton import LEAST, _conv3d, rows_of, shared_memory, tiles
from lightx2v_kernels.conv_input._triton import conv_input, direct
from lightx2v_kernels.doubled_conv import reference


def by_phase(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (2, 2, O, 2, 2, C): a kernel for even and odd rows and columns of the result."""
    w = weight.float()
    tall = torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2], w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2)
    both = torch.stack([tall[..., 0], tall[..., 1] + tall[..., 2], tall[..., 0] + tall[..., 1], tall[..., 2]], 3)
    return both.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(2, 4, 0, 3, 5, 1).to(weight.dtype).contiguous()


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (b, c, t, h, w), o = x.shape, weight.shape[0]
    padded = rows_of(conv_input(x, None, (1, 1), False, 1))
    out = torch.empty((b, t, 2 * h, 2 * w, o), dtype=x.dtype, device=x.device)
    made = tiles(c, o, (1, 2, 2), shared_memory(x.device))
    grid = (triton.cdiv(h * w, made.places) * t, 4 * triton.cdiv(o, made.channels + made.more_channels), b)
    _conv3d[grid](
        padded, padded, by_phase(weight), weight.new_zeros(o) if bias is None else bias, out, out, t, h + 2, w + 2,
        C=c, OUT=o, KT=1, KH=2, KW=2, PAST=False, RESIDUAL=False, DOUBLED=True,
        BLOCK_M=made.places, BLOCK_N=made.channels, MORE_N=made.more_channels, BLOCK_K=made.depth, STAGES=made.stages,
        num_warps=made.warps,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)


_opaque = torch.library.custom_op("lightx2v::doubled_conv", _launch, mutates_args=())


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    b, _, t, h, w = x.shape
    return x.new_empty(b, t, 2 * h, 2 * w, weight.shape[0]).permute(0, 4, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: list[Any] = [None if a is None else a.detach().requires_grad_() for a in ctx.saved_tensors]
    with torch.enable_grad():
        out = reference.doubled_conv(*saved)
    found = iter(torch.autograd.grad(out, [a for a in saved if a is not None], grad))
    return tuple(None if a is None else next(found) for a in saved)


_opaque.register_autograd(_backward, setup_context=_setup)


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See the contract in `__init__`."""
    if weight.shape[1] % LEAST:
        return reference.plain(x, weight, bias)
    out: Tensor = direct(_launch, _opaque)(x, weight, bias)
    return out
