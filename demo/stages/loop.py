"""Training by the clock: one step again and again, as a CUDA graph where there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.optim import Optimizer, plateau
from demo.stages.run import Run, save_state

Work = Callable[[], tuple[Tensor, Tensor]]


def capture(work: Work, prepare: Callable[[], None], generator: torch.Generator) -> Work:
    """A step as one CUDA graph: launching its thousands of small kernels takes longer than they do.

    Runs three steps first, each after `prepare`. Each call of the result returns the same two tensors with new values.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            prepare()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        results = work()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


@dataclass(frozen=True)
class Clock:
    """How long to train, in seconds of all invocations together, and the shares of it for warm-up and decay."""

    seconds: float
    spent: float = 0.0  # by earlier invocations
    warm: float = 0.02
    decay: float = 0.5


def clock_since(start: float, seconds: float, *, warm: float) -> Clock:
    """A stage's clock after preparations that began at `start` (time.monotonic); a tenth of it is always left."""
    return Clock(seconds, min(time.monotonic() - start, 0.9 * seconds), warm)


def fit(
    run: Run,
    name: str,
    optimizer: Optimizer,
    work: Work,
    generator: torch.Generator,
    clock: Clock,
    *,
    graph: bool,
    on_step: Callable[[float], None] = lambda progress: None,
) -> float:
    """Repeat `work` until the clock's seconds or the run's deadline are over; returns the seconds spent in all.

    work: one step from drawing a batch to `optimizer.apply()`; returns the error and the gradients' norm.
    generator: what `work` draws from. on_step: called after each step with the progress, 0..1.
    """
    total, count, start = torch.zeros((), device=run.device), 0, time.monotonic()

    def spent() -> float:
        return clock.spent + time.monotonic() - start

    def prepare() -> None:
        optimizer.prepare(plateau(spent() / clock.seconds, warm=clock.warm, decay=clock.decay))

    if graph:
        work = capture(work, prepare, generator)
        run.log("captured the training step")
    while spent() < clock.seconds and run.left() > 0:
        prepare()
        error, norm = work()
        total += error
        count += 1
        if optimizer.steps in (1, 20, 100) or optimizer.steps % 500 == 0:
            mean = float(total) / count
            run.log(f"{name} {optimizer.steps} error {mean:.4f} norm {float(norm):.2f} at {spent():.1f} s")
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: the loss is {mean} after {optimizer.steps} steps")
            total.zero_()
            count = 0
        if optimizer.steps % 16 == 0:
            run.synchronize()  # or the host runs seconds ahead of the device, and the clock means nothing
        on_step(spent() / clock.seconds)
    run.synchronize()
    return spent()


def learn(
    run: Run,
    name: str,
    optimizer: Optimizer,
    loss: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    seconds: float,
    *,
    after: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], float]:
    """Train until `seconds` of training in all invocations together, or until the deadline.

    loss: what to minimise and, detached, the error to tell, of a fresh batch. after: follows every step.
    Returns the averaged weights by parameter name and the progress, 0..1. State: `name`.pt.
    """
    generator, spent, path = run.generator(4), 0.0, run.state / f"{name}.pt"
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.restore(saved["optimizer"])
        generator.set_state(saved["generator"])
        spent = saved["spent"]

    def work() -> tuple[Tensor, Tensor]:
        value, error = loss(generator)
        value.backward()
        norm = optimizer.apply()
        after()
        return error, norm

    clock = Clock(seconds, spent, warm=0.02, decay=0.5)
    spent = fit(run, name, optimizer, work, generator, clock, graph=run.compile)
    save_state(path, {"optimizer": optimizer.state(), "generator": generator.get_state(), "spent": spent})
    run.report(f"{name}_train", {"steps": optimizer.steps, "seconds": round(spent, 1)})
    return optimizer.averaged(), min(1.0, spent / seconds)
