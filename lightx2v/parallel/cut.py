"""Which of a walk's tokens one process takes; what block arguments hold of each token is cut the same way."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """Consecutive tokens that are cut by themselves: `runs` runs of `length` tokens, of each of which all get a part.

    Runs: tokens that share a modulation, so that every process keeps as many runs of equal length.
    valid: of each sample of the batch, how many of a last stream's tokens count; None: all.
    """

    runs: int
    length: int
    valid: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        return self.runs * self.length


@dataclass(frozen=True)
class Cut:
    """Part `place` of `parts` parts, each of neighbouring tokens, whose lengths differ by one at most."""

    place: int
    parts: int

    def span(self, length: int) -> tuple[int, int]:
        """[start, stop) of a run of that length."""
        return length * self.place // self.parts, length * (self.place + 1) // self.parts

    def size(self, length: int) -> int:
        """Tokens of a run of that length."""
        start, stop = self.span(length)
        return stop - start

    def of(self, x: Tensor, dim: int, runs: int = 1) -> Tensor:
        """This part of every run along that dimension of x; a view where there is one run."""
        start, stop = self.span(x.shape[dim] // runs)
        if runs == 1:
            return x.narrow(dim, start, stop - start)
        return x.unflatten(dim, (runs, -1)).narrow(dim + 1, start, stop - start).flatten(dim, dim + 1)


class Shardable(Protocol):
    """What a family's block arguments know of their tokens."""

    def streams(self, tokens: int) -> tuple[Stream, ...]:
        """How so many tokens may be cut. Only the last stream may be padded."""
        ...

    def cut(self, cut: Cut) -> Any:
        """The same arguments for that part of the tokens, none of which is padding to them."""
        ...
