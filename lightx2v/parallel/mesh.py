"""The processes that make one video together, and with which of them this one exchanges what.

Ranks lie on three axes, the fastest last: cfg, ring, ulysses. So the ranks of one ulysses group, which exchange the
most, are neighbours, on one machine where there are several. Nothing here starts processes: torchrun does, or whoever
has initialised torch.distributed.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightx2v.config import Parallel

if TYPE_CHECKING:  # builds of PyTorch without torch.distributed lack it
    from torch.distributed import ProcessGroup

# How long the others wait where one works alone: reading and running encoders, decoding. Exchanges of tensors keep the
# process group's own, shorter limit, for nobody works alone between two of them.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process. local: which of its machine's processes it is, and so which GPU it takes."""

    rank: int
    size: int
    local: int


def launched() -> Launch | None:
    """None where torchrun, or what speaks like it, did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return None
    return Launch(*(int(os.environ[name]) for name in names))


def beside() -> int:
    """Processes of one video on this machine, which share its memory; 1 where nobody says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this process. None: a GPU where there is one, else the CPU.

    "cuda" without a number is the GPU of the local rank, so that of several processes each has its own.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    launch = launched()
    if chosen.type != "cuda" or chosen.index is not None or launch is None or launch.size == 1:
        return chosen
    if launch.local >= torch.cuda.device_count():
        raise ValueError(
            f"process {launch.local} of this machine has no GPU: there are {torch.cuda.device_count()}; start one "
            "process a GPU (torchrun --nproc_per_node)"
        )
    return torch.device("cuda", launch.local)


@dataclass(frozen=True)
class Line:
    """The ranks along one axis that this process works with.

    ranks: their numbers in the mesh, in order along the axis. place: this process's own among them.
    group: None where it is alone.
    """

    ranks: tuple[int, ...]
    place: int
    group: "ProcessGroup | None" = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def neighbour(self, steps: int) -> int:
        """The rank so many places on, around the end."""
        return self.ranks[(self.place + steps) % self.size]


@dataclass(frozen=True)
class Layout:
    """How the tokens of one walk lie on the ranks that share them.

    sizes: tokens on each of them. lengths: of each of them, how many tokens of each sample of the batch count, the
    others are padding behind them; None: all count.
    """

    sizes: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Walk:
    """layout: of the walk that is under way; None outside of one, where every rank has all tokens.

    Told by what cuts the tokens to the attention inside the blocks, between which lies the model, which never knows.
    """

    layout: Layout | None = None


@dataclass(frozen=True)
class Mesh:
    """What one process knows of the others.

    whole: all of them. sequence: those that share the tokens of this one's pass, along ring and then ulysses.
    cfg: those that compute the two passes of guidance: place 0 the conditional one.
    control: all of them, for words and numbers on the CPU, and for waiting long.
    """

    parallel: Parallel
    rank: int
    device: torch.device
    whole: Line
    sequence: Line
    ulysses: Line
    ring: Line
    cfg: Line
    control: "ProcessGroup"
    walk: Walk = field(default_factory=Walk, compare=False)

    @property
    def size(self) -> int:
        return self.parallel.size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which reads prompts and pictures, and writes and prints."""
        return self.rank == 0


def join(parallel: Parallel, device: torch.device) -> Mesh:
    """The mesh of all processes of torch.distributed, which every one of them must join at the same time.

    Where torch.distributed is not initialised, it is, by what torchrun told this process: NCCL between GPUs, gloo
    between CPUs. Raises ValueError where nothing started several processes, or another number of them.
    """
    if not dist.is_available():
        raise ValueError(
            f"{parallel.describe()} needs torch.distributed, which this build of PyTorch {torch.__version__} lacks"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # one process, one GPU: NCCL and Triton work on the current one
    if not dist.is_initialized():
        _initialise(parallel, device)
    if dist.get_world_size() != parallel.size:
        raise ValueError(
            f"{parallel.describe()} takes {parallel.size} processes, but {dist.get_world_size()} were started: start "
            f"{parallel.size} (torchrun --nproc_per_node {parallel.size}), or choose sizes whose product is "
            f"{dist.get_world_size()}"
        )
    rank, ranks = dist.get_rank(), torch.arange(parallel.size).view(parallel.cfg, parallel.ring, parallel.ulysses)
    everyone = range(parallel.size)
    return Mesh(
        parallel,
        rank,
        device,
        whole=Line(tuple(everyone), rank, dist.group.WORLD),
        sequence=_line(ranks.flatten(1).tolist(), rank),
        ulysses=_line(ranks.flatten(0, 1).tolist(), rank),
        ring=_line(ranks.transpose(1, 2).flatten(0, 1).tolist(), rank),
        cfg=_line(ranks.flatten(1).T.tolist(), rank),
        control=dist.new_group(list(everyone), backend="gloo", timeout=PATIENCE),
    )


def _initialise(parallel: Parallel, device: torch.device) -> None:
    if launched() is None:
        raise ValueError(
            f"{parallel.describe()} takes {parallel.size} processes and this is one alone: start the program with "
            f"torchrun --nproc_per_node {parallel.size}"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _line(lines: Sequence[Sequence[int]], rank: int) -> Line:
    """Of all lines along one axis the one that rank lies on. Every rank must ask for the same lines in one order."""
    mine = Line((rank,), 0)
    for ranks in lines:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks))
            if rank in ranks:
                mine = Line(tuple(ranks), list(ranks).index(rank), group)
    return mine
