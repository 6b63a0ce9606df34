"""Tokens in the form that the next linear layers want: plain, or in 8 bits once for all of them."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from lightx2v_kernels import Kernels, Quantized

Tokens = Tensor | Quantized
# Tokens that a feed-forward takes at once: all of a video at 480p. More go in pieces: their hidden rows would be the
# largest thing on the device, 4.2 GB of a 14B at 720p.
WHOLE, PIECE = 1 << 15, 1 << 14
Reads = torch.dtype | None  # the 8-bit dtype in which layers read tokens; None: plain
T = TypeVar("T", bound=Tokens)


def agreed(*linears: nn.Module) -> Reads:
    """In what all of these layers read tokens, so that theirs are quantised once; None: plain tokens.

    Layers that read plain tokens, and those with a LoRA beside them, which reads them too, agree on none.
    """
    first, *rest = (cast(Reads, getattr(linear, "reads", None)) for linear in linears)
    return first if all(reads is first for reads in rest) else None


def shaped_as(x: Tensor, tokens: T) -> T:
    """The same tokens in the shape (..., K) of x."""
    if isinstance(tokens, Quantized):
        return cast(T, Quantized(tokens.values.view(x.shape), tokens.scale.view(*x.shape[:-1], 1)))
    return cast(T, cast(Tensor, tokens).view(x.shape))


def modulate(kernels: Kernels, reads: Reads, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tokens:
    """See the op."""
    if reads is None:
        return kernels.modulate(x, shift, scale, eps)
    return kernels.modulate_quantize(x, shift, scale, eps, reads)


def gelu_between(kernels: Kernels, whole: nn.Module, first: nn.Module, second: nn.Module, tokens: Tokens) -> Tensor:
    """The feed-forward `whole`, second(gelu(first(tokens))), with what is between in the form that `second` wants."""
    if (reads := agreed(second)) is not None:
        return second(kernels.gelu_quantize(first(tokens), reads))
    if type(first) is nn.Linear and isinstance(tokens, Tensor):
        return second(kernels.linear_gelu(tokens, first.weight, first.bias))
    return whole(tokens)


def piece_of(tokens: int) -> int:
    """How many tokens a feed-forward takes at once; the same ones whatever memory there is."""
    return tokens if tokens <= WHOLE else PIECE


def in_pieces(feed: Callable[[Tokens], Tensor], tokens: Tokens) -> Tensor:
    """What `feed` makes of tokens (B, L, K), a piece at a time."""
    batch, length, _ = (tokens.values if isinstance(tokens, Quantized) else tokens).shape
    if (piece := piece_of(batch * length)) == batch * length:
        return feed(tokens)
    out: Tensor | None = None
    step = max(1, piece // batch)
    for start in range(0, length, step):
        fed = feed(_some(tokens, slice(start, start + step)))
        out = fed.new_empty(batch, length, fed.shape[2]) if out is None else out
        out[:, start : start + step] = fed
        del fed
    assert out is not None
    return out


def _some(tokens: Tokens, those: slice) -> Tokens:
    if isinstance(tokens, Quantized):
        return Quantized(tokens.values[:, those].contiguous(), tokens.scale[:, those].contiguous())
    return tokens[:, those]


def residual_modulate(
    kernels: Kernels, reads: Reads, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tokens]:
    """See the op."""
    if reads is None:
        return kernels.residual_modulate(x, y, gate, shift, scale, eps)
    return kernels.residual_modulate_quantize(x, y, gate, shift, scale, eps, reads)


def residual_layer_norm(
    kernels: Kernels, reads: Reads, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tokens]:
    """See the op."""
    if reads is None:
        return kernels.residual_layer_norm(x, y, gate, weight, bias, eps)
    return kernels.residual_layer_norm_quantize(x, y, gate, weight, bias, eps, reads)
