"""What passes between a process that asks for videos and its worker processes: one pickled message after another.

The pipe is the pair's own, so that what is unpickled was written by this package.
"""

import pickle
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightx2v.config import Cache, Engine, Sampling
from lightx2v.diffuse import Start
from lightx2v.guidance import Conditioning
from lightx2v.lora import Lora
from lightx2v.offload import Plan
from lightx2v.sampling import Step

Value = TypeVar("Value", Start, Conditioning)


@dataclass(frozen=True)
class Job:
    """One pass of the sampler; every rank is given the same.

    transformers: file or folder of one, or of the high- and the low-noise expert.
    previews: whether rank 0 sends its estimate after every step.
    failed: the plan of an attempt whose memory ran out, so that less of the model is to be on the device.
    pin_limit: bytes of RAM that each may pin; None: as many as the system lets it.
    """

    transformers: tuple[Path, ...]
    engine: Engine
    loras: tuple[Lora, ...]
    start: Start
    sampling: Sampling
    cond: Conditioning
    uncond: Conditioning | None
    cache: Cache = field(default_factory=Cache)
    previews: bool = False
    failed: Plan | None = None
    pin_limit: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents, (B, C, T, H, W)."""
        shape = tuple(self.start.latents.shape)
        return shape if len(shape) == 5 else (*shape[:2], 1, *shape[2:])

    def packed(self) -> "Job":
        """The same, whose tensors are on the CPU and bring no more than themselves."""
        uncond = None if self.uncond is None else _own_all(self.uncond)
        return replace(self, start=_own_all(self.start), cond=_own_all(self.cond), uncond=uncond)


@dataclass(frozen=True)
class Measure:
    """Time a step of the job, on rank 0 alone and on all."""

    job: Job


@dataclass(frozen=True)
class Rest:
    """Give the weights back, and stay."""


@dataclass(frozen=True)
class Cancel:
    """Stop what runs, all ranks at the same place, and stay."""


@dataclass(frozen=True)
class Ready:
    """Wait for what comes: the process has joined the others, or has given its weights back."""


@dataclass(frozen=True)
class Alive:
    """Sent every second while there is something to do. place: what it is, in words."""

    place: str


@dataclass(frozen=True)
class Progress:
    """Of rank 0, after a step. x0: (B, C, T, H, W) in model space, where previews are asked for."""

    step: Step
    x0: Tensor | None


@dataclass(frozen=True)
class Done:
    """latents: raw, of rank 0. lines: for the report. peak, held: bytes of device memory at most, and still held; None
    where they are not counted."""

    latents: Tensor | None
    lines: tuple[str, ...] = ()
    peak: int | None = None
    held: int | None = None


@dataclass(frozen=True)
class Measured:
    """Of rank 0: seconds of a step on it alone and on all ranks; nothing where the step made no finite numbers."""

    seconds: tuple[float, float] | None


@dataclass(frozen=True)
class Stopped:
    """The job was cancelled."""


@dataclass(frozen=True)
class Failed:
    """The job raised. shortage: because device memory ran out; plan: with this one, if one was made."""

    error: Exception
    traceback: str
    shortage: bool = False
    plan: Plan | None = None


Outcome = Ready | Done | Measured | Stopped | Failed  # what a rank answers, after which it waits
Message = Job | Measure | Rest | Cancel | Alive | Progress | Outcome


class RankError(RuntimeError):
    """A worker process ended, or stopped answering; the message names it and says what was done about it."""


def send(connection: "Connection[Any, Any]", message: Message) -> None:
    """Raises OSError where nobody is at the other end."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: "Connection[Any, Any]") -> Message:
    """Waits. Raises EOFError or OSError where nobody is at the other end."""
    return pickle.loads(connection.recv_bytes())  # noqa: S301  (of a process that this one started)


def own(tensor: Tensor) -> Tensor:
    """A tensor as it can be sent: on the CPU, without the rest of the memory that it is a view of."""
    tensor = tensor.detach().cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _own_all(value: Value) -> Value:
    """A dataclass with each of its tensors as it can be sent."""
    given = {each.name: getattr(value, each.name) for each in fields(value)}
    changed: dict[str, Any] = {name: own(each) for name, each in given.items() if isinstance(each, Tensor)}
    return replace(value, **changed)


def sendable(error: Exception) -> Exception:
    """The error if it can be sent, else its words."""
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301  (its own bytes)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if str(again) == str(error) else RuntimeError(f"{type(error).__name__}: {error}")
