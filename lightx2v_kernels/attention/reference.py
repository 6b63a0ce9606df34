"""Attention written out: the definition.

Holds all L x S scores of every head in fp32, so it is for short clips and for checking others.
"""

from torch import Tensor

from lightx2v_kernels.precision import FLOATS, widen
from lightx2v_kernels.registry import Backend


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D) in the dtype of q, computed in fp32."""
    return attention_plain(widen(q), widen(k), widen(v)).to(q.dtype)


def attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same at the inputs' own dtype, every intermediate rounded: the yardstick of a kernel of that dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L | S, D)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, L, S)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def attention_partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the logarithm of each softmax's denominator (B, H, L) float32."""
    wide = widen(q).transpose(1, 2) * q.shape[-1] ** -0.5
    return attention(q, k, v), (wide @ widen(k).permute(0, 2, 3, 1)).logsumexp(dim=-1).float()


BACKENDS = (
    Backend("attention", "reference", lambda: attention, rank=1000, dtypes=FLOATS, partial=lambda: attention_partial),
)
