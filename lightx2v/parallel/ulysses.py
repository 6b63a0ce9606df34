"""Attention over tokens that lie on several processes: each brings its tokens, and leaves with some heads of all.

Jacobs et al. 2023, arXiv:2309.14509: before attention queries, keys and values change from some tokens of all heads to
all tokens of some heads, after it the result changes back. Both are one exchange each: q, k and v travel together,
token by token, so that what arrives is read in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from lightx2v.config import Parallel
from lightx2v.parallel.mesh import Layout, Line, Mesh
from lightx2v.parallel.ring import Partial, ring
from lightx2v.parallel.wire import Wire
from lightx2v_kernels import AttentionFn, Kernels, rotary_attention

# q (B, L, H, D), k and v of this process's place in the ring, the tokens at each place -> (B, L, H, D)
Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def require_heads(heads: int, parallel: Parallel, model: str) -> None:
    """Raise ValueError, with the sizes that work, where a model's heads cannot be shared out."""
    if heads % parallel.ulysses:
        sizes = [size for size in range(2, heads + 1) if heads % size == 0]
        raise ValueError(
            f"ulysses={parallel.ulysses} cannot share the {heads} heads of {model}: choose "
            f"{', '.join(map(str, sizes)) or '1'}, or ring, which shares no heads and takes any number of processes"
        )


def spread(kernels: Kernels, mesh: Mesh, partial: Partial | None = None) -> Kernels:
    """The same kernels with the attention of tokens to each other over all processes that share a pass's tokens.

    Outside of a sharded walk they compute as before. partial: attention that a ring can merge, where there is one.
    """
    wire = Wire(kernels.quantize if mesh.parallel.exchange == "fp8" else None)
    whole, own = kernels.attention, kernels.rotary_attention
    inner: Attend = ring(partial, mesh, wire) if partial is not None else lambda q, k, v, sizes: whole(q, k, v)
    shared = _attention(inner, mesh, wire)
    turned = rotary_attention(shared, kernels.norm_rope)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return whole(q, k, v) if mesh.walk.layout is None else shared(q, k, v)

    def rotary(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return (own if mesh.walk.layout is None else turned)(q, k, v, a, b, cos, sin, eps)

    return replace(kernels, attention=attention, rotary_attention=rotary)


def _attention(attend: Attend, mesh: Mesh, wire: Wire) -> AttentionFn:
    line, places = mesh.ulysses, mesh.ring.size

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = mesh.walk.layout
        assert layout is not None
        of_place = [layout.sizes[i * line.size : (i + 1) * line.size] for i in range(places)]
        sizes = of_place[mesh.ring.place]
        if line.size > 1:
            q, k, v = to_heads((q, k, v), sizes, line, wire)
        if layout.lengths is None:
            y = attend(q, k, v, [sum(each) for each in of_place])
        else:
            y = _each_sample(attend, (q, k, v), layout, mesh)
        return to_tokens(y, sizes, line) if line.size > 1 else y

    return attention


def _each_sample(attend: Attend, qkv: Sequence[Tensor], layout: Layout, mesh: Mesh) -> Tensor:
    """Sample by sample, only the tokens that count; the result is zeros where they do not."""
    assert layout.lengths is not None
    count, place = mesh.ulysses.size, mesh.ring.place
    y = torch.zeros(qkv[0].shape, dtype=qkv[0].dtype, device=qkv[0].device)
    of_place = [slice(i * count, (i + 1) * count) for i in range(mesh.ring.size)]
    starts = [0, *accumulate(layout.sizes[of_place[place]])]
    for i in range(len(y)):
        lengths = [length[i] for length in layout.lengths]
        own = zip(starts, lengths[of_place[place]], strict=False)
        rows = torch.cat([torch.arange(start, start + length, device=y.device) for start, length in own])
        q, k, v = (x[i : i + 1].index_select(1, rows) for x in qkv)
        y[i : i + 1].index_copy_(1, rows, attend(q, k, v, [sum(lengths[part]) for part in of_place]))
    return y


def to_heads(qkv: Sequence[Tensor], sizes: Sequence[int], line: Line, wire: Wire) -> tuple[Tensor, ...]:
    """Each (B, L, H, D), this process's tokens -> (B, sum(sizes), H / n, D), its heads of everybody's; strided."""
    first, count = qkv[0], line.size
    batch, tokens, heads, _ = first.shape
    room = wire.empty(first, (count, tokens, batch, len(qkv), heads // count))
    for index, x in enumerate(qkv):
        wire.write(room[:, :, :, index].permute(2, 1, 0, 3, 4), x.unflatten(2, (count, -1)))
    received = room.new_empty(sum(sizes), *room.shape[2:])
    dist.all_to_all_single(received, room.flatten(0, 1), list(sizes), [tokens] * count, group=line.group)
    each = wire.read(received, first.dtype).unbind(2)
    return tuple(x.transpose(0, 1) for x in each)


def to_tokens(y: Tensor, sizes: Sequence[int], line: Line) -> Tensor:
    """(B, sum(sizes), H / n, D), this process's heads of everybody's tokens -> (B, L, H, D), its tokens."""
    batch, _, heads, size = y.shape
    tokens = sizes[line.place]
    sent = y.transpose(0, 1).contiguous()
    received = y.new_empty(line.size * tokens, batch, heads, size)
    dist.all_to_all_single(received, sent, [tokens] * line.size, list(sizes), group=line.group)
    return received.unflatten(0, (line.size, tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3)
