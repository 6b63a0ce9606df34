"""Which implementation of an op runs: what each one needs, why it cannot run here, and which one is taken.

An op is a folder: its `__init__.py` states the contract as `OPS`, every other file in it offers `BACKENDS`. A new
backend is a new file and nothing else. A file whose name starts with an underscore is not a backend: it holds what may
only be imported when its backend is taken.

Everything here runs when a model is built. What comes out is a plain callable, so the hot path has no names and no
look-ups.
"""

import functools
import importlib
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels import timings
from lightx2v_kernels.backend import Backend, Op, self_test, why_otherwise, why_wrong
from lightx2v_kernels.closeness import cosine
from lightx2v_kernels.machine import installed, listed, short
from lightx2v_kernels.timings import Timings, Workload

__all__ = [
    *("AUTO", "EXACT", "Backend", "Op", "Registry", "UnsupportedBackendError", "choices", "names", "registries"),
    *("registry", "select", "self_test", "why_otherwise", "why_wrong"),
]

AUTO = "auto"  # the fastest
EXACT = "exact"  # the fastest of those that are not lossy
# From this rank on a backend is for when nothing else can run: it is not timed.
LAST_RESORT = 1000
# What "auto" asks of a lossy backend: the cosine of its result to fp32, and that it saves this share of the time of the
# fastest exact one.
CLOSE_ENOUGH, WORTHWHILE = 0.999, 0.1

logger = logging.getLogger(__name__)


class UnsupportedBackendError(RuntimeError):
    """No backend can do what was asked. The message names each one tried, why it cannot run and what would let it."""


@dataclass(frozen=True)
class Registry:
    """The backends of one op. A value: `register` returns a new one.

    workloads: name -> what speed is measured on; without one the ranks decide.
    elsewhere: names that other projects have for this op -> what to do here, in words.
    rotary: the contract of `Backend.rotary`.
    """

    op: Op
    backends: tuple[Backend, ...] = ()
    workloads: Mapping[str, Workload] = field(default_factory=dict, hash=False)
    elsewhere: Mapping[str, str] = field(default_factory=dict, hash=False)
    rotary: Op | None = None

    def __post_init__(self) -> None:
        seen = {AUTO, EXACT}
        for backend in self.backends:
            if backend.op != self.op.name:
                raise ValueError(f"backend '{backend.name}' is for op '{backend.op}', not for '{self.op.name}'")
            if backend.name in seen:
                raise ValueError(f"{self.op.name} backend '{backend.name}' is registered twice")
            seen.add(backend.name)

    def register(self, backend: Backend) -> "Registry":
        """This registry and one backend more. Raises ValueError if the name is taken or the op is another."""
        return replace(self, backends=(*self.backends, backend))

    def names(self) -> tuple[str, ...]:
        """Backend names, best rank first."""
        return tuple(backend.name for backend in self.ranked())

    def refusals(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> Mapping[str, str | None]:
        """name -> why it cannot run there (None: it can), best rank first. Runs no kernel."""
        return {backend.name: backend.why_not(device, dtype, head_dim) for backend in self.ranked()}

    def choices(self) -> tuple[str, ...]:
        """What `select` takes: "auto", "exact", then the names."""
        return AUTO, EXACT, *self.names()

    def select(
        self, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, workload: str = "self"
    ) -> Backend:
        """The backend `name`, or for "auto" and "exact" the best that is capable and passes its self-test there.

        Best is the fastest on `workload` where the op has it and the device is a GPU, else the one of the lowest rank.
        Raises UnsupportedBackendError if the name is unknown, or if nothing that was asked for can run.
        """
        device = _indexed(device)
        if name in (AUTO, EXACT):
            return self._best(name, device, dtype, head_dim, workload)
        known = {backend.name: backend for backend in self.backends}
        if name not in known:
            raise UnsupportedBackendError(self._unknown(name))
        backend = known[name]
        if backend.variants and device.type == "cuda" and workload in self.workloads:
            return self._best(name, device, dtype, head_dim, workload)
        if reason := backend.why_not(device, dtype, head_dim) or self.fault(backend, device, dtype, head_dim):
            others = [n for n, why in self.refusals(device, dtype, head_dim).items() if why is None and n != name]
            raise UnsupportedBackendError(
                f"{self.op.name} backend '{name}' cannot run on {_place(device, dtype, head_dim)}: {reason}; "
                f"use {listed([AUTO, *others])} instead"
            )
        return backend

    def _best(self, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, workload: str) -> Backend:
        if device.type == "cuda" and workload in self.workloads:
            try:
                return _fastest(self, name, device, dtype, head_dim, workload)
            except torch.OutOfMemoryError as error:  # full now: not a fact about this machine, so not kept
                logger.info("%s: speed is not measured, the ranks decide: %s", self.op.name, error)
        return _first(self, name, device, dtype, head_dim)

    def fault(self, backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the backend fails its self-test, or that of its own rotary attention, in words; None if it passes."""
        reason = self_test(self.op, backend, device, dtype, head_dim)
        if reason is None and backend.rotary and self.rotary:
            own = replace(backend, op=self.rotary.name, load=backend.rotary, rotary=None)
            reason = self_test(self.rotary, own, device, dtype, head_dim)
        return reason

    def candidates(self, name: str) -> list[Backend]:
        """What a choice is made from, best rank first."""
        named = {other for backend in self.backends if backend.name == name for other in (name, *backend.variants)}
        return [
            backend
            for backend in self.ranked()
            if name == AUTO or (name == EXACT and backend.max_error is None) or backend.name in named
        ]

    def ranked(self) -> list[Backend]:
        """The backends in the order in which "auto" tries them where nothing is measured."""
        return sorted(self.backends, key=lambda backend: (backend.rank, backend.name))

    def _unknown(self, name: str) -> str:
        choices = listed(self.choices())
        if name in self.elsewhere:
            return f"{self.op.name} backend '{name}': {self.elsewhere[name]}; known: {choices}"
        return f"unknown {self.op.name} backend '{name}'; known: {choices}"


@functools.cache
def registries() -> Mapping[str, Registry]:
    """op name -> its registry, read from the folders of this package. Optional packages are not imported."""
    package = importlib.import_module(__package__)
    found: dict[str, Registry] = {}
    for folder in pkgutil.iter_modules(package.__path__, prefix=f"{__package__}."):
        if not folder.ispkg:
            continue
        contract = importlib.import_module(folder.name)
        offered = [
            backend
            for file in pkgutil.iter_modules(contract.__path__)
            if not file.name.startswith("_")
            for backend in importlib.import_module(f"{folder.name}.{file.name}").BACKENDS
        ]
        ops = {op.name: op for op in contract.OPS}
        if astray := [backend for backend in offered if backend.op not in ops]:
            raise ValueError(
                f"backend '{astray[0].name}' in {folder.name} is for op '{astray[0].op}'; there: {listed(ops)}"
            )
        for op in ops.values():
            mine = tuple(backend for backend in offered if backend.op == op.name)
            more = (getattr(contract, name, {}).get(op.name, usual) for name, usual in _MORE)
            found[op.name] = Registry(op, mine, *more)
    return found


# What a contract may state beside its ops, by the op's name.
_MORE: tuple[tuple[str, Any], ...] = (("WORKLOADS", {}), ("ELSEWHERE", {}), ("ROTARY", None))


def registry(op: str) -> Registry:
    """The registry of one op. Raises UnsupportedBackendError if there is no such op."""
    if op not in registries():
        raise UnsupportedBackendError(f"unknown op '{op}'; known: {listed(registries())}")
    return registries()[op]


def names(op: str) -> tuple[str, ...]:
    """Backend names of an op, best rank first."""
    return registry(op).names()


def choices(op: str) -> tuple[str, ...]:
    """What may be asked for: "auto", "exact", then the backend names of an op, best rank first."""
    return registry(op).choices()


def select(
    op: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, workload: str = "self"
) -> Backend:
    """See Registry.select."""
    return registry(op).select(name, device, dtype, head_dim, workload)


# Two more caches of facts about this machine, as `self_test`; what `timings` keeps between processes, where versions
# change, has them in its key.
@functools.cache
def _first(registry: Registry, name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The best-ranked of the candidates that is exact, capable and passes its self-test."""
    op, passed_over = registry.op, {}
    for backend in registry.candidates(name):
        if backend.max_error is not None:
            passed_over[backend.name] = "lossy, and its speed is not measured here; runs when named"
        elif why := backend.why_not(device, dtype, head_dim) or registry.fault(backend, device, dtype, head_dim):
            passed_over[backend.name] = why
        else:
            aside = _aside(registry, passed_over)
            logger.info("%s: %s on %s%s", op.name, backend.name, _place(device, dtype, head_dim), aside)
            return backend
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over.items()) or "none is registered"
    raise UnsupportedBackendError(f"no {op.name} backend can run on {_place(device, dtype, head_dim)}: {reasons}")


@functools.cache
def _fastest(
    registry: Registry, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, workload: str
) -> Backend:
    """The fastest of the candidates; what was measured in an earlier process is not measured again."""
    candidates = {backend.name: backend for backend in registry.candidates(name) if backend.rank < LAST_RESORT}
    reasons = {each: backend.why_not(device, dtype, head_dim) for each, backend in candidates.items()}
    able = [backend for each, backend in candidates.items() if reasons[each] is None]
    refused = {each: why for each, why in reasons.items() if why}
    facts = timings.facts_of(
        device,
        op=registry.op.name,
        workload=workload,
        dtype=short(dtype),
        head_dim=head_dim,
        candidates={each.name: each.distribution and installed(each.distribution) for each in able},
        triton=installed("triton"),
    )
    found = timings.read(facts)
    taken = found and _pick(found, able)
    if not (found and taken) or registry.fault(taken, device, dtype, head_dim):
        found = _time(registry, able, device, dtype, head_dim, workload)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # it took a GB, once; what is planned next counts free memory
        taken = _pick(found, able)
        if found.ms:
            timings.write(facts, found)
    if not taken:
        return _first(registry, name, device, dtype, head_dim)
    others = [f"{each} {ms:.3g}" for each, ms in sorted(found.ms.items(), key=lambda it: it[1]) if each != taken.name]
    logger.info(
        "%s (%s): %s takes %.3g ms on %s%s%s",
        *(registry.op.name, workload, taken.name, found.ms[taken.name], _place(device, dtype, head_dim)),
        f"; {', '.join(others)}" if others else "",
        _aside(registry, {**refused, **found.passed_over}),
    )
    return taken


def _time(
    registry: Registry, able: Sequence[Backend], device: torch.device, dtype: torch.dtype, head_dim: int, workload: str
) -> Timings:
    """Time those of the backends that pass their self-test, and that are right at this size too."""
    op, load, backends = registry.op, registry.workloads[workload], {backend.name: backend for backend in able}
    verdicts = {each.name: registry.fault(each, device, dtype, head_dim) for each in able}
    failed = {name: why for name, why in verdicts.items() if why}
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        arguments = load.arguments(device, dtype, head_dim)
        first, *others = load.inner(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
        truth = op.reference(load.rows(first), *others)
        first, *others = load.inner(*arguments)
        plain = (op.plain or op.reference)(load.rows(first), *others)

        def why_far(name: str, out: Tensor) -> str | None:
            part, backend = load.rows(out), backends[name]
            if reason := why_otherwise(part, plain) or why_wrong(backend, (part,), (truth,), (plain,)):
                return f"at {tuple(out.shape)}: {reason}"
            if backend.max_error is not None and (found := cosine(part, truth)) < CLOSE_ENOUGH:
                return f"lossy, cosine {found:.5f} to fp32 is below {CLOSE_ENOUGH}; runs when named"
            return None

        functions = {
            name: load.function(backend, device, dtype, head_dim)
            for name, backend in backends.items()
            if name not in failed
        }
        timed = timings.measure(functions, arguments, why_far)
    return Timings(timed.ms, {**failed, **timed.passed_over})


def _pick(found: Timings, able: Sequence[Backend]) -> Backend | None:
    """The fastest exact one, or a lossy one that is faster by enough."""
    ordered = sorted((each for each in able if each.name in found.ms), key=lambda each: found.ms[each.name])
    exact = next((each for each in ordered if each.max_error is None), None)
    lossy = next((each for each in ordered if each.max_error is not None), None)
    if exact and lossy:
        return lossy if found.ms[lossy.name] <= (1 - WORTHWHILE) * found.ms[exact.name] else exact
    return exact or lossy


def _aside(registry: Registry, passed_over: Mapping[str, str]) -> str:
    """Why not the others, for a line of log, where a package that is not there needs no more words than that."""
    absent = [backend.name for backend in registry.backends if backend.absent and backend.name in passed_over]
    told = "; ".join(f"{name}: {why}" for name, why in passed_over.items() if name not in absent)
    parts = [f"passed over: {told}"] * bool(told) + [f"not installed: {', '.join(absent)}"] * bool(absent)
    return f" ({'; '.join(parts)})" if parts else ""


def _indexed(device: torch.device) -> torch.device:
    # "cuda" means whichever GPU is current, which may change; facts are cached about one GPU.
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UnsupportedBackendError(
            f"device '{device}' was asked for, but PyTorch {torch.__version__} sees no GPU; use device 'cpu'"
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _place(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{gpu}, {short(dtype)}, head_dim {head_dim}"
