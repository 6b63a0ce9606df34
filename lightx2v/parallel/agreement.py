"""What all processes of a mesh must know at the same point: what one did alone, and that one must stop.

An exchange of tensors waits for all of them. So a process that would raise where the others go on tells them first, and
all raise. These words travel over the CPU and never make a GPU wait.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightx2v.parallel.mesh import Mesh

Result = TypeVar("Result")


class StoppedElsewhereError(RuntimeError):
    """Another process of this video stopped, and says why. rank: which."""

    def __init__(self, rank: int, said: str) -> None:
        super().__init__(f"process {rank} of this video stopped: {said}")
        self.rank = rank


def meet(mesh: Mesh | None) -> None:
    """Wait until all are here, however long one works alone."""
    if mesh is not None:
        dist.barrier(group=mesh.control)


def on_first(mesh: Mesh | None, work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, for everybody; the others wait. Without a mesh: what it returns.

    The result travels pickled, tensors on the CPU. Raises the error of rank 0 there, StoppedElsewhereError elsewhere.
    """
    if mesh is None:
        return work()
    return _told(mesh, work)


def only_on_first(mesh: Mesh | None, work: Callable[[], Result]) -> Result | None:
    """What `work` returns on rank 0, and None elsewhere, when it is done. Errors as of `on_first`."""
    if mesh is None:
        return work()
    made: list[Result] = []

    def keep() -> None:
        made.append(work())

    _told(mesh, keep)
    return made[0] if mesh.first else None


def _told(mesh: Mesh, work: Callable[[], Any]) -> Any:
    box: list[Any] = [None]
    failed: BaseException | None = None
    if mesh.first:
        try:
            box = [(work(), None)]
        except BaseException as error:
            failed, box = error, [(None, words_of(error))]
    dist.broadcast_object_list(box, src=0, group=mesh.control)
    if failed is not None:
        raise failed
    made, said = box[0]
    if said is not None:
        raise StoppedElsewhereError(0, said)
    return made


def first_said(mesh: Mesh | None, said: str | None) -> tuple[int, str] | None:
    """Of what the processes say, each a text or None, the first, with its rank; None where all say None.

    Costs one number a process unless somebody has something to say.
    """
    if mesh is None:
        return None if said is None else (0, said)
    flag = torch.tensor([said is not None], dtype=torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.control)
    if not flag.item():
        return None
    everything: list[str | None] = [None] * mesh.size
    dist.all_gather_object(everything, said, group=mesh.control)
    return next((rank, text) for rank, text in enumerate(everything) if text is not None)


def together(mesh: Mesh, call: Callable[[], None]) -> None:
    """Call what may raise; where it raises on one process, it raises on all, after the same call.

    Raises the own error where it has one, StoppedElsewhereError where only others have.
    """
    failed: BaseException | None = None
    try:
        call()
    except BaseException as error:
        failed = error
    stopped = first_said(mesh, None if failed is None else words_of(failed))
    if failed is not None:
        raise failed
    if stopped is not None:
        raise StoppedElsewhereError(*stopped)


def words_of(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return str(error) or type(error).__name__
