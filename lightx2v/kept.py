"""What every step of a request would compute alike: made in the first step, read in all others.

Keys and values of the prompt and of images depend neither on the latents nor on the timestep.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from torch import nn

from lightx2v.blocks import Branch

Made = TypeVar("Made")


class Keep(Protocol):
    """What `make` returns, or returned before for the same module of the network."""

    def __call__(self, owner: nn.Module, make: Callable[[], Made]) -> Made: ...


def anew(owner: nn.Module, make: Callable[[], Made]) -> Made:
    """Keeps nothing."""
    return make()


class Kept:
    """A `Keep` for passes of one network with the same conditioning and batch; what it holds goes with it."""

    def __init__(self) -> None:
        self._made: dict[nn.Module, Any] = {}

    def __call__(self, owner: nn.Module, make: Callable[[], Made]) -> Made:
        if owner not in self._made:
            self._made[owner] = make()
        return cast(Made, self._made[owner])


class KeptByBranch:
    """One `Kept` for each branch of guidance, of one network's steps `ran` in one request."""

    def __init__(self, ran: range) -> None:
        self._ran = ran
        self._branches: dict[Branch, Kept] = {}

    def of(self, step: int, branch: Branch) -> Keep:
        """For that pass. After the branch's last step nothing is held here, and of a single step nothing is kept."""
        if len(self._ran) < 2:
            return anew
        kept = self._branches.setdefault(branch, Kept())
        if step + 1 == self._ran.stop:
            del self._branches[branch]
        return kept
