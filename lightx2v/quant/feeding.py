"""In which form linear layers want their tokens."""

import torch
from torch import Tensor, nn

from lightx2v_kernels import Quantized


def agreed(*linears: nn.Module) -> torch.dtype | None:
    """The 8-bit dtype that all of these layers read, so that their tokens are quantised once; None: plain tokens.

    Layers that read plain tokens, and those with a LoRA beside them, which reads them too, agree on none.
    """
    first, *rest = (getattr(linear, "reads", None) for linear in linears)
    return first if all(reads is first for reads in rest) else None


def shaped_as(x: Tensor, tokens: Quantized) -> Quantized:
    """The same tokens in the shape (..., K) of x."""
    return Quantized(tokens.values.view(x.shape), tokens.scale.view(*x.shape[:-1], 1))
