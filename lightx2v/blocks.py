"""How a transformer walks its block list. Caching and weight streaming wrap the walk; models never know."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor


class Unadded(Protocol):
    """Tokens to which a block's last result is still to be added: the next block does so in its own first pass."""

    def added(self) -> Tensor:
        """The tokens (B, L, D)."""
        ...


# (tokens (B, L, D), or Unadded of the block before; the family's own block arguments) -> tokens or Unadded. Never
# writes into the tokens that it is given: caches keep them. What goes around `run_blocks` sees tokens alone.
Block = Callable[[Any, Any], Any]
# (blocks, tokens (B, L, D), the family's own block arguments) -> (B, L, D)
RunBlocks = Callable[[Sequence[Block], Tensor, Any], Tensor]
Branch = Literal["cond", "uncond"]  # of guidance
# (index of the step in the full schedule, branch) -> how the blocks are walked in that pass
Walks = Callable[[int, Branch], RunBlocks]


def added(tokens: Tensor | Unadded) -> Tensor:
    """Of what a block returned, the tokens (B, L, D)."""
    return tokens if isinstance(tokens, Tensor) else tokens.added()


def run_blocks(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
    passed: Tensor | Unadded = tokens
    for block in blocks:
        passed = block(passed, args)
    return added(passed)


def interruptible(run: RunBlocks, check: Callable[[], None]) -> RunBlocks:
    """Call `check` before every block; it cancels the run by raising."""

    def checked(block: Block) -> Block:
        def call(tokens: Tensor | Unadded, args: Any) -> Tensor | Unadded:
            check()
            return block(tokens, args)

        return call

    def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
        return run([checked(block) for block in blocks], tokens, args)

    return walk
