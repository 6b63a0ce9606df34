"""What a cache is told of a request before its first step, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightx2v.blocks import Branch, RunBlocks, Walks

# (transformer, timesteps (N,) in [0, 1000], on any device, projected) -> (N, K) float32: the embedding of each
# timestep, as the head reads it, or projected, as the blocks read it.
TimeSignal = Callable[[nn.Module, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Turn:
    """What one network has to do in one request. Steps are counted over the full schedule, from 0.

    expert: "high", "low", or "" where there is one network.
    steps: those that the network has in the full schedule; timesteps: what it is told at each of them.
    ran: those of them that this request runs.
    total: steps of the full schedule, of all networks together.
    guided: whether each step has an unconditional pass too.
    """

    expert: str
    steps: range
    timesteps: tuple[float, ...]
    ran: range
    total: int
    guided: bool
    network: Callable[[], nn.Module]
    time_signal: TimeSignal | None

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("cond", "uncond") if self.guided else ("cond",)

    @property
    def first(self) -> int:
        """Position within `steps` of the first one that runs."""
        return self.ran.start - self.steps.start


# Called once for each network and request: all that a cache keeps lives in what it returns.
CacheFactory = Callable[[Turn, RunBlocks], Walks]
