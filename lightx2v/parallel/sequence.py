"""A walk whose tokens are shared out: cut before the first block, gathered after the last.

Caches and block streaming go around it and see whole tokens; what looks at blocks (cancelling, the search for NaN) goes
inside it and sees this process's part.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.blocks import Block, RunBlocks
from lightx2v.parallel.cut import Cut, Stream
from lightx2v.parallel.mesh import Layout, Mesh, Walk
from lightx2v.parallel.wire import from_all


def shard(run: RunBlocks, mesh: Mesh | None) -> RunBlocks:
    """The same walk over this process's part of the tokens.

    The blocks' arguments must be `Shardable`. Raises ValueError where there are fewer tokens than processes.
    """
    if mesh is None or mesh.sequence.size == 1:
        return run
    own = Cut(mesh.sequence.place, mesh.sequence.size)

    def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
        streams = _filled(args.streams(tokens.shape[1]), len(tokens), own.parts)
        with _laid_out(mesh.walk, layout_of(streams, len(tokens), own.parts)):
            out = run(blocks, taken(tokens, streams, own), args.cut(own))
        return gathered(out, streams, tokens.shape[1], mesh)

    return walk


@contextmanager
def _laid_out(walk: Walk, layout: Layout) -> Iterator[None]:
    walk.layout = layout
    try:
        yield
    finally:
        walk.layout = None


def _filled(streams: Sequence[Stream], batch: int, parts: int) -> tuple[Stream, ...]:
    """The streams, the last with padding where it is too short for everybody to get a token of it."""
    *others, last = streams
    for stream in streams if last.runs > 1 or not others else others:
        if stream.length < parts:
            raise ValueError(
                f"{stream.length} tokens {'a frame ' if stream.runs > 1 else ''}cannot be shared by {parts} processes: "
                "make the video larger, or start fewer"
            )
    if last.length < parts:
        last = replace(last, length=parts, valid=last.valid or (last.length,) * batch)
    return (*others, last)


def layout_of(streams: Sequence[Stream], batch: int, parts: int) -> Layout:
    """How many tokens each process gets, and how many of them count."""
    cuts = [Cut(place, parts) for place in range(parts)]
    sizes = tuple(sum(stream.runs * cut.size(stream.length) for stream in streams) for cut in cuts)
    valid = streams[-1].valid
    if valid is None:
        return Layout(sizes)

    def counted(cut: Cut, size: int) -> tuple[int, ...]:
        start, stop = cut.span(streams[-1].length)
        return tuple(size - (stop - start) + min(max(valid[i] - start, 0), stop - start) for i in range(batch))

    return Layout(sizes, tuple(map(counted, cuts, sizes)))


def taken(tokens: Tensor, streams: Sequence[Stream], cut: Cut) -> Tensor:
    """That part of tokens (B, L, D): of every stream, one after the other."""
    short = sum(stream.tokens for stream in streams) - tokens.shape[1]
    if short:
        tokens = F.pad(tokens, (0, 0, 0, short))
    each = tokens.split([stream.tokens for stream in streams], 1)
    parts = [cut.of(x, 1, stream.runs) for x, stream in zip(each, streams, strict=True)]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def gathered(part: Tensor, streams: Sequence[Stream], count: int, mesh: Mesh) -> Tensor:
    """All `count` tokens (B, L, D) of everybody's part of them, in their order, on every process."""
    cuts = [Cut(place, mesh.sequence.size) for place in range(mesh.sequence.size)]
    most = max(sum(stream.runs * cut.size(stream.length) for stream in streams) for cut in cuts)
    received = from_all(F.pad(part, (0, 0, 0, most - part.shape[1])), mesh.sequence)
    out = part.new_empty(part.shape[0], sum(stream.tokens for stream in streams), part.shape[2])
    for cut, theirs in zip(cuts, received, strict=True):
        begin = read = 0
        for stream in streams:
            start, stop = cut.span(stream.length)
            size = stream.runs * (stop - start)
            place = out[:, begin : begin + stream.tokens].unflatten(1, (stream.runs, stream.length))
            place[:, :, start:stop] = theirs[:, read : read + size].unflatten(1, (stream.runs, stop - start))
            begin, read = begin + stream.tokens, read + size
    return out[:, :count]
