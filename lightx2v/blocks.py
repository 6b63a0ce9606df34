"""How a transformer walks its block list. Caching and weight streaming wrap the walk; models never know."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

# Never writes into the tokens that it is given: caches keep them.
Block = Callable[[Tensor, Any], Tensor]
# (blocks, tokens (B, L, D), the family's own block arguments) -> (B, L, D)
RunBlocks = Callable[[Sequence[Block], Tensor, Any], Tensor]
Branch = Literal["cond", "uncond"]  # of guidance
# (index of the step in the full schedule, branch) -> how the blocks are walked in that pass
Walks = Callable[[int, Branch], RunBlocks]


def run_blocks(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
    for block in blocks:
        tokens = block(tokens, args)
    return tokens


def interruptible(run: RunBlocks, check: Callable[[], None]) -> RunBlocks:
    """Call `check` before every block; it cancels the run by raising."""

    def checked(block: Block) -> Block:
        def call(tokens: Tensor, args: Any) -> Tensor:
            check()
            return block(tokens, args)

        return call

    def walk(blocks: Sequence[Block], tokens: Tensor, args: Any) -> Tensor:
        return run([checked(block) for block in blocks], tokens, args)

    return walk
