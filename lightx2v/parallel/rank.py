"""What one process does with a job: the request that every rank runs, of which it computes its share."""

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightx2v.cache.choice import choose
from lightx2v.cache.walk import CacheReport
from lightx2v.config import Parallel
from lightx2v.diffuse import Hooks, Model, diffuse
from lightx2v.heap import trim_heap
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.loading import require_kernels
from lightx2v.offload import Asked, rows_of
from lightx2v.offload.shortage import free_unused, ran_out
from lightx2v.parallel.agreement import StoppedElsewhereError, only_on_first, together, words_of
from lightx2v.parallel.gain import FEW, MORE, of_depths, one_step, shallow
from lightx2v.parallel.jobs import (
    Done,
    Failed,
    Job,
    Measure,
    Measured,
    Message,
    Outcome,
    Progress,
    Ready,
    Rest,
    Stopped,
    own,
    sendable,
)
from lightx2v.parallel.mesh import Mesh, join
from lightx2v.parts import Parts
from lightx2v.sampling import Step

log = logging.getLogger(__name__)
COLLECTIVE_LIMIT = timedelta(minutes=30)  # ranks read their weights at their own pace, slow disks included


class Asker(Protocol):
    """Whoever gave the job. place: what this rank is at, in words."""

    place: str

    def cancelled(self) -> bool: ...
    def send(self, message: Message) -> None: ...


class Cancelled(Exception):
    """All ranks stop at the same place."""


class Rank:
    """One of `size` processes; constructing joins it to the others, which meet at the file `store`."""

    def __init__(self, asker: Asker, rank: int, size: int, device: torch.device, store: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # With device_id NCCL connects at once, so that GPUs that cannot reach each other say so here.
        backend, own_gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        met = dist.FileStore(store, size)
        dist.init_process_group(
            backend, store=met, rank=rank, world_size=size, timeout=COLLECTIVE_LIMIT, device_id=own_gpu
        )
        self._asker, self._device = asker, device
        self._meshes: dict[Parallel, Mesh] = {}
        self._infos: tuple[CheckpointInfo, ...] = ()
        self._versions: tuple[object, ...] = ()
        self._parts = Parts(None, (), device)

    def work(self, task: Message) -> Outcome:
        """Do a task; never raises."""
        try:
            if isinstance(task, Job):
                return self._sample(task)
            if isinstance(task, Measure):
                return self._measure(one_step(task.job))
            if isinstance(task, Rest):
                self._rest()
            return Ready()
        except Cancelled:
            return Stopped()
        except StoppedElsewhereError as error:
            if str(error).endswith(words_of(Cancelled())):
                return Stopped()
            failed = self._failed(error)
        except Exception as error:
            failed = self._failed(error)
        free_unused()  # what failed is held by its own error until here
        return failed

    def _failed(self, error: Exception) -> Failed:
        return Failed(sendable(error), traceback.format_exc(), ran_out(error), self._parts.plan)

    def _rest(self) -> None:
        self._parts.forget_transformers()
        free_unused()

    def _sample(self, job: Job) -> Done:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        reports: list[CacheReport] = []
        with self._model(job) as (model, mesh):
            cache = choose(job.cache, self._infos, reports.append)
            hooks = self._hooks(mesh, job.previews)
            latents = diffuse(model, job.start, job.sampling, job.cond, job.uncond, hooks=hooks, cache=cache)
        done = Done(latents, tuple(self._parts.said(reports))) if mesh.first else Done(None)
        trim_heap()
        if self._device.type != "cuda":
            return done
        torch.cuda.empty_cache()  # others may decode on this device now
        peak, held = torch.cuda.max_memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        return replace(done, peak=peak, held=held)

    def _measure(self, job: Job) -> Outcome:
        with self._model(job) as (model, mesh):
            self._asker.place = "measuring whether several devices are worth it"

            def seconds(model: Model, depth: int) -> float:
                began = time.perf_counter()
                run = shallow(depth)
                diffuse(model, job.start, job.sampling, job.cond, job.uncond, hooks=self._hooks(mesh, False), run=run)
                return time.perf_counter() - began  # latents have come to the CPU: nothing runs any longer

            def rounds(model: Model) -> list[float]:
                seconds(model, FEW)  # compiles, and finds its memory
                return [min(seconds(model, depth) for _ in range(2)) for depth in (FEW, MORE)]

            try:
                every = rounds(model)
                one = only_on_first(mesh, lambda: rounds(replace(model, mesh=None)))
            except FloatingPointError as error:
                log.info("not measured: %s", error)
                return Measured(None)
        if one is None:
            return Ready()
        gain = of_depths((one[0], every[0]), (one[1], every[1]), self._infos[0].config.num_layers)
        return Measured((gain.one, gain.all))

    @contextmanager
    def _model(self, job: Job) -> Iterator[tuple[Model, Mesh]]:
        """The model of a job, ready on every rank."""
        parallel = job.engine.parallel
        if parallel not in self._meshes:
            self._meshes[parallel] = join(parallel, self._device)
        mesh = self._meshes[parallel]
        self._use(job.transformers)
        self._parts.use_mesh(mesh, one_copy=True)
        self._asker.place = "choosing kernels"
        # Rank 0 times them undisturbed, and the others find what it wrote down: all take the same.
        only_on_first(mesh, lambda: require_kernels(self._infos, job.engine, self._device))
        self._asker.place = "reading weights"
        cached = job.cache.method != "none"
        rows = rows_of(job.cond, job.uncond if job.sampling.guided else None)
        asked = Asked(job.shape, cached, job.loras, rows, failed=job.failed, pin_limit=job.pin_limit)
        made: list[Model] = []
        with ExitStack() as stack:
            opened = self._parts.model(job.engine, job.loras, "auto", asked)
            together(mesh, lambda: made.append(stack.enter_context(opened)))
            yield made[0], mesh

    def _use(self, paths: tuple[Path, ...]) -> None:
        """These transformers from now on; read again where a file has changed since."""
        infos = tuple(identify(path) for path in paths)
        versions = (*paths, *(tuple(sorted(info.header.stamps.items())) for info in infos))
        if versions != self._versions:
            self._parts.use_transformers(infos)
            self._infos, self._versions = infos, versions

    def _hooks(self, mesh: Mesh, previews: bool) -> Hooks:
        """Any rank that was told to stop stops all of them: `diffuse` sees to that."""
        step, calls = "before the first step", 0

        def on_block() -> None:
            nonlocal calls
            if self._asker.cancelled():
                raise Cancelled
            calls += 1
            self._asker.place = f"{step}, call {calls} of a block"

        def on_step(done: Step, x0: Tensor) -> None:
            nonlocal step, calls
            step, calls = f"step {done.index + 2} of {done.total}", 0
            if self._asker.cancelled():
                raise Cancelled
            if mesh.first:
                self._asker.send(Progress(done, own(x0) if previews else None))

        return Hooks(on_step, on_block)
