"""Four convolutions of 2x2 in place of one of 3x3 on four times the pixels: 16 products for 36.

Of the nine pixels under the kernel, doubled, at most four differ. Where a row of the result is even, the kernel's first
row lies on one pixel's row and the other two on the next; where it is odd, the first two lie on one and the last on the
next. Columns alike. So the weights that lie on the same pixel are added first, in fp32.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.conv3d._tiles import chosen
from lightx2v_kernels.conv3d._triton import LEAST, rows_of, run
from lightx2v_kernels.conv_input._triton import conv_input, direct
from lightx2v_kernels.doubled_conv import reference

PHASE = (1, 2, 2)  # the kernel of each


def by_phase(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (2, 2, O, 2, 2, C): a kernel for even and odd rows and columns of the result."""
    w = weight.float()
    tall = torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2], w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2)
    both = torch.stack([tall[..., 0], tall[..., 1] + tall[..., 2], tall[..., 0] + tall[..., 1], tall[..., 2]], 3)
    return both.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(2, 4, 0, 3, 5, 1).to(weight.dtype).contiguous()


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    (b, c, t, h, w), o = x.shape, weight.shape[0]
    how = chosen(c, o, PHASE, x.device)
    out = torch.empty((b, t, 2 * h, 2 * w, o), dtype=x.dtype, device=x.device)
    padded, shift = rows_of(conv_input(x, None, (1, 1), False, 1)), weight.new_zeros(o) if bias is None else bias
    run(padded, None, by_phase(weight), shift, None, out, PHASE, how, relu)
    return out.permute(0, 4, 1, 2, 3)


_opaque = torch.library.custom_op("lightx2v::doubled_conv", _launch, mutates_args=())


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    b, _, t, h, w = x.shape
    return x.new_empty(b, t, 2 * h, 2 * w, weight.shape[0]).permute(0, 4, 1, 2, 3)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *given, ctx.relu = inputs
    ctx.save_for_backward(*given)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: list[Any] = [None if a is None else a.detach().requires_grad_() for a in ctx.saved_tensors]
    with torch.enable_grad():
        out = partial(reference.doubled_conv, relu=ctx.relu)(*saved)
    found = iter(torch.autograd.grad(out, [a for a in saved if a is not None], grad))
    return (*(None if a is None else next(found) for a in saved), None)


_opaque.register_autograd(_backward, setup_context=_setup)


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """See the contract in `__init__`."""
    if weight.shape[1] % LEAST:
        return reference.plain(x, weight, bias, relu)
    out: Tensor = direct(_launch, _opaque)(x, weight, bias, relu)
    return out
