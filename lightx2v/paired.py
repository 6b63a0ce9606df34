"""Both passes of guidance over one copy of each block: the first pass's block, then the second's, block after block.

Where blocks pass through the device, a step then copies each of them once and not twice. Each pass computes what it
would compute alone, in kernels of the same shapes.

The second pass begins within the first one's walk, once its tokens are embedded, and its own walk is the one of both;
what is around a walk (caches, cancelling, streaming) needs to know nothing of it, and an error of either ends both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightx2v.blocks import Block, RunBlocks, Unadded, added

Pass = Callable[[], Tensor]
# (conditional pass, unconditional pass) -> what they give
Both = Callable[[Pass, Pass], tuple[Tensor, Tensor]]


def in_turn(first: Pass, second: Pass) -> tuple[Tensor, Tensor]:
    """One after the other."""
    return first(), second()


@dataclass
class _Walk:
    """Of the first pass, which waits for the second's."""

    blocks: Sequence[Block]
    tokens: Tensor
    args: Any
    out: Tensor | None = None


class Paired:
    """A `RunBlocks`, for the walks of one request, that lets the two passes given to `both` walk together.

    run: walks the blocks. A pass that walks none, because a cache skips it, leaves the other to walk alone.
    """

    def __init__(self, run: RunBlocks) -> None:
        self._run = run
        self._begin: Callable[[], None] | None = None  # the second pass, until it has begun
        self._first: _Walk | None = None  # until the second pass walks

    def both(self, first: Pass, second: Pass) -> tuple[Tensor, Tensor]:
        """What the two give. Raises what either raises, and nothing of them is left."""
        found: list[Tensor] = []
        self._begin = lambda: found.append(second())
        try:
            one = first()
            if self._begin is not None:  # the first walked no blocks
                self._take()()
        finally:
            self._begin = self._first = None
        return one, found[0]

    def _take(self) -> Callable[[], None]:
        begin, self._begin = self._begin, None
        assert begin is not None
        return begin

    def __call__(self, blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
        if (first := self._first) is not None:
            self._first = None
            return self._together(first, blocks, tokens, args)
        if self._begin is None:
            return self._run(blocks, tokens, args)
        waiting = self._first = _Walk(blocks, tokens, args)
        self._take()()
        self._first = None
        return self._run(blocks, tokens, args) if waiting.out is None else waiting.out

    def _together(self, first: _Walk, blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
        passed: list[Tensor | Unadded] = [tokens]  # popped, so that a block's input lives no longer than it takes

        def pair(own: Block, other: Block) -> Block:
            def call(of_first: Tensor | Unadded, first_args: Any) -> Tensor | Unadded:
                out = own(of_first, first_args)
                passed.append(other(passed.pop(), args))
                return out

            return call

        pairs = [pair(own, other) for own, other in zip(first.blocks, blocks, strict=True)]
        first.out = self._run(pairs, first.tokens, first.args)
        return added(passed.pop())
