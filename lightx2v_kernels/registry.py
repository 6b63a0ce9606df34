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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels import timings
from lightx2v_kernels.closeness import cosine, relative_error, why_too_far
from lightx2v_kernels.machine import importable, installed, listed, short, sm_reasons, version_reason
from lightx2v_kernels.quantized import tensors, widths
from lightx2v_kernels.timings import Timings, Workload

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
class Op:
    """The contract of one op.

    reference: plain PyTorch with fp32 inside: the definition of the op, and its CPU path.
    examples: (device, dtype, head_dim) -> argument tuples, small, for the self-test; strided inputs among them.
    plain: the op as one would write it in PyTorch at the inputs' own dtype; its error is the yardstick of the
        self-test; None: the reference itself.
    truth: what the result stands for where that is not what the reference computes in fp64: tokens before they were
        put into 8 bits; None: the reference itself.
    upstream: names LightX2V knows for this op, so that one of its configs gets an answer instead of "unknown".
    """

    name: str
    reference: Callable[..., Any]
    examples: Callable[[torch.device, torch.dtype, int], tuple[tuple[Any, ...], ...]]
    plain: Callable[..., Any] | None = None
    truth: Callable[..., Any] | None = None
    upstream: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Backend:
    """One implementation of one op, and what it needs. None means no limit.

    load: imports what the backend needs and returns the callable; called only once the backend is about to be taken.
    rank: where nothing is measured, `auto` tries the lowest first.
    package: top-level module that must be importable, or several of which one must be; probed, never imported here.
    fix: what installs it.
    distribution, majors: what installers call the package, and which of its major versions will do.
    devices: torch device types. min_sm, max_sm: CUDA compute capability, both inclusive, as (major, minor).
    max_error: set for a backend that is lossy by design: the relative error to fp32 that it keeps to. Such a backend
        runs when named; `auto` takes it where it is measured to be close enough and worth its error.
    rotary: imports and returns the backend's own `Kernels.rotary_attention`, where it has one.
    variants: other backends of this op, which compute the same: where speed is measured, naming this one takes the
        fastest of it and them.
    """

    op: str
    name: str
    load: Callable[[], Callable[..., Any]]
    rank: int
    package: str | tuple[str, ...] | None = None
    fix: str | None = None
    distribution: str | None = None
    majors: frozenset[int] | None = None
    devices: frozenset[str] | None = None
    min_sm: tuple[int, int] | None = None
    max_sm: tuple[int, int] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_dims: frozenset[int] | None = None
    max_error: float | None = None
    rotary: Callable[[], Callable[..., Any]] | None = None
    variants: tuple[str, ...] = ()

    @property
    def _packages(self) -> tuple[str, ...]:
        return (self.package,) if isinstance(self.package, str) else self.package or ()

    @property
    def absent(self) -> bool:
        """Whether its package is not installed."""
        return bool(self._packages) and not any(map(importable, self._packages))

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Every reason why this backend cannot run there, in words, with what would change it; None if it can."""
        reasons = []
        fix = self.fix or f"pip install {self.distribution or self.package}"
        if self.absent:
            reasons.append(f"package '{' or '.join(self._packages)}' is not installed ({fix})")
        elif self.distribution and self.majors and (reason := version_reason(self.distribution, self.majors)):
            reasons.append(f"{reason} ({fix})")
        if self.devices and device.type not in self.devices:
            reasons.append(f"needs a {' or '.join(sorted(self.devices))} device, got {device.type}")
        if self.min_sm or self.max_sm:
            reasons.extend(sm_reasons(device, self.min_sm, self.max_sm))
        if self.dtypes and dtype not in self.dtypes:
            reasons.append(f"needs dtype {listed(sorted(map(short, self.dtypes)))}, got {short(dtype)}")
        if self.head_dims and head_dim not in self.head_dims:
            reasons.append(f"needs head_dim {listed(map(str, sorted(self.head_dims)))}, got {head_dim}")
        return "; ".join(reasons) or None


@dataclass(frozen=True)
class Registry:
    """The backends of one op. A value: `register` returns a new one.

    workloads: name -> what speed is measured on; without one the ranks decide.
    elsewhere: names that other projects have for this op -> what to do here, in words.
    """

    op: Op
    backends: tuple[Backend, ...] = ()
    workloads: Mapping[str, Workload] = field(default_factory=dict, hash=False)
    elsewhere: Mapping[str, str] = field(default_factory=dict, hash=False)

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
        if reason := backend.why_not(device, dtype, head_dim) or self_test(self.op, backend, device, dtype, head_dim):
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
            workloads = getattr(contract, "WORKLOADS", {}).get(op.name, {})
            found[op.name] = Registry(op, mine, workloads, getattr(contract, "ELSEWHERE", {}).get(op.name, {}))
    return found


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


# Caches of pure facts about this machine, keyed by everything they depend on. Package versions cannot change under a
# running process, so they are no part of the key; what `timings` keeps between processes, where they could, has them.
@functools.cache
def self_test(op: Op, backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run the backend on the op's examples on that very device: None if it computes the op, else why not, in words."""
    with torch.no_grad():
        for args in op.examples(device, dtype, head_dim):
            try:
                made = backend.load()(*args)
                # .cpu() waits for the device: an asynchronous fault is this kernel's, not that of whoever runs next.
                out = tuple(t.cpu() for t in tensors(made))
            except torch.OutOfMemoryError:  # says that memory is full now, nothing about the kernel: not to be cached
                raise
            except Exception as error:  # a vendor's build may fail with anything, and the next on the list may work
                return f"its self-test raised {type(error).__name__}: {error}"
            # On the CPU, so that the truth does not share the faults of the device under test.
            truth = (op.truth or op.reference)(*(a.cpu().double() if isinstance(a, Tensor) else a for a in args))
            usual = (op.plain or op.reference)(*args)
            plain = tuple(t.cpu() for t in tensors(usual))
            if reason := why_otherwise(made, usual) or why_wrong(backend, out, tensors(truth), plain):
                return f"its self-test failed: {reason}"
    return None


@functools.cache
def _first(registry: Registry, name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The best-ranked of the candidates that is exact, capable and passes its self-test."""
    op, passed_over = registry.op, {}
    for backend in registry.candidates(name):
        if backend.max_error is not None:
            passed_over[backend.name] = "lossy, and its speed is not measured here; runs when named"
        elif why := backend.why_not(device, dtype, head_dim) or self_test(op, backend, device, dtype, head_dim):
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
    if not (found and taken) or self_test(registry.op, taken, device, dtype, head_dim):
        found = _time(registry, able, device, dtype, head_dim, workload)
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
    verdicts = {each.name: self_test(op, each, device, dtype, head_dim) for each in able}
    failed = {name: why for name, why in verdicts.items() if why}
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        arguments = load.arguments(device, dtype, head_dim)
        few = (load.rows(arguments[0]), *arguments[1:])
        truth, plain = op.reference(*(each.double() for each in few)), (op.plain or op.reference)(*few)

        def why_wrong(name: str, out: Tensor) -> str | None:
            part = load.rows(out)
            if reason := why_otherwise(part, plain) or _why_wrong(backends[name], part, truth, plain):
                return f"at {tuple(out.shape)}: {reason}"
            if backends[name].max_error is not None and (found := cosine(part, truth)) < CLOSE_ENOUGH:
                return f"lossy, cosine {found:.5f} to fp32 is below {CLOSE_ENOUGH}; runs when named"
            return None

        functions = {name: backend.load() for name, backend in backends.items() if name not in failed}
        timed = timings.measure(functions, arguments, why_wrong)
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


def why_otherwise(result: Any, expected: Any) -> str | None:
    """Why a result is not made as the reference's is (number of tensors, their dtypes), in words; None if it is."""
    if (found := widths(result)) == (wanted := widths(expected)):
        return None
    return f"dtype {' and '.join(map(str, found))}, expected {' and '.join(map(str, wanted))}"


def why_wrong(
    backend: Backend, out: tuple[Tensor, ...], truth: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> str | None:
    """Why these results are too far from the truth (fp32 or fp64), by the closeness rule or the error that the backend
    declares, in words; None if they are not. plain: the yardstick's results. See `quantized.tensors`."""
    for parts in zip(out, truth, plain, strict=True):
        if reason := _why_wrong(backend, *parts):
            return reason
    return None


def _why_wrong(backend: Backend, out: Tensor, truth: Tensor, plain: Tensor) -> str | None:
    if backend.max_error is None:
        return why_too_far(out, truth, plain)
    if out.shape != truth.shape or out.dtype != plain.dtype:
        return f"{out.dtype} {tuple(out.shape)}, expected {plain.dtype} {tuple(truth.shape)}"
    if not (found := relative_error(out, truth)) <= backend.max_error:
        return f"relative error {found:.2e} is above the {backend.max_error:.2e} that it declares"
    return None


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
