"""A vendor's function as one op that torch.compile and CUDA graphs do not look into."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def opaque(name: str, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`run` as the op lightx2v::<name>: (B, L, H, D), (B, S, H, D) twice -> (B, L, H, D), contiguous.

    Its gradient is that of PyTorch's attention on the same inputs: not every package has one of its own.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v).contiguous()

    op = torch.library.custom_op(f"lightx2v::{name}", forward, mutates_args=())
    op.register_fake(lambda q, k, v: q.new_empty(q.shape))

    def keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [each.detach().transpose(1, 2).requires_grad_() for each in ctx.saved_tensors]  # type: ignore[attr-defined]
            out = F.scaled_dot_product_attention(*leaves)
        return tuple(each.transpose(1, 2) for each in torch.autograd.grad(out, leaves, gradient.transpose(1, 2)))

    op.register_autograd(backward, setup_context=keep)
    return op
