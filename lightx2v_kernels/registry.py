"""Which implementation of an op runs: what each one needs, why it cannot run here, and which one is taken.

An op is a folder: its `__init__.py` states the contract as `OPS`, every other file in it offers `BACKENDS`. A new
backend is a new file and nothing else. A file whose name starts with an underscore is not a backend: it holds what may
only be imported when its backend is taken.

Everything here runs when a model is built. What comes out is a plain callable, so the hot path has no names and no
look-ups.
"""

import functools
import importlib
import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.closeness import relative_error, why_too_far
from lightx2v_kernels.quantized import tensors, widths

AUTO = "auto"

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
    rank: `auto` tries the lowest first.
    package: top-level module that must be importable; probed, never imported here. fix: what installs it.
    devices: torch device types. min_sm, max_sm: CUDA compute capability, both inclusive, as (major, minor).
    max_error: set for a backend that is lossy by design: the relative error to fp32 that it keeps to. Such a backend
        runs when named, and is never taken by `auto`.
    """

    op: str
    name: str
    load: Callable[[], Callable[..., Any]]
    rank: int
    package: str | None = None
    fix: str | None = None
    devices: frozenset[str] | None = None
    min_sm: tuple[int, int] | None = None
    max_sm: tuple[int, int] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_dims: frozenset[int] | None = None
    max_error: float | None = None

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Every reason why this backend cannot run there, in words, with what would change it; None if it can."""
        reasons = []
        if self.package and not _importable(self.package):
            reasons.append(f"package '{self.package}' is not installed ({self.fix or f'pip install {self.package}'})")
        if self.devices and device.type not in self.devices:
            reasons.append(f"needs a {' or '.join(sorted(self.devices))} device, got {device.type}")
        if self.min_sm or self.max_sm:
            reasons.extend(_sm_reasons(device, self.min_sm, self.max_sm))
        if self.dtypes and dtype not in self.dtypes:
            reasons.append(f"needs dtype {_listed(sorted(map(_short, self.dtypes)))}, got {_short(dtype)}")
        if self.head_dims and head_dim not in self.head_dims:
            reasons.append(f"needs head_dim {_listed(map(str, sorted(self.head_dims)))}, got {head_dim}")
        return "; ".join(reasons) or None


@dataclass(frozen=True)
class Registry:
    """The backends of one op. A value: `register` returns a new one."""

    op: Op
    backends: tuple[Backend, ...] = ()

    def __post_init__(self) -> None:
        seen = {AUTO}
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

    def select(self, name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
        """The backend `name`, or for "auto" the best-ranked one that is capable and passes its self-test there.

        Raises UnsupportedBackendError if the name is unknown, or if nothing that was asked for can run.
        """
        device = _indexed(device)
        if name == AUTO:
            return _best(self, device, dtype, head_dim)
        known = {backend.name: backend for backend in self.backends}
        if name not in known:
            raise UnsupportedBackendError(self._unknown(name))
        backend = known[name]
        if reason := backend.why_not(device, dtype, head_dim) or self_test(self.op, backend, device, dtype, head_dim):
            others = [n for n, why in self.refusals(device, dtype, head_dim).items() if why is None and n != name]
            raise UnsupportedBackendError(
                f"{self.op.name} backend '{name}' cannot run on {_place(device, dtype, head_dim)}: {reason}; "
                f"use {_listed([AUTO, *others])} instead"
            )
        return backend

    def ranked(self) -> list[Backend]:
        """The backends in the order in which "auto" tries them."""
        return sorted(self.backends, key=lambda backend: (backend.rank, backend.name))

    def _unknown(self, name: str) -> str:
        choices = _listed([AUTO, *self.names()])
        if name in self.op.upstream:
            return f"'{name}' is an upstream name that this version does not provide yet; use {choices}"
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
                f"backend '{astray[0].name}' in {folder.name} is for op '{astray[0].op}'; there: {_listed(ops)}"
            )
        for op in ops.values():
            found[op.name] = Registry(op, tuple(backend for backend in offered if backend.op == op.name))
    return found


def registry(op: str) -> Registry:
    """The registry of one op. Raises UnsupportedBackendError if there is no such op."""
    if op not in registries():
        raise UnsupportedBackendError(f"unknown op '{op}'; known: {_listed(registries())}")
    return registries()[op]


def names(op: str) -> tuple[str, ...]:
    """Backend names of an op, best rank first."""
    return registry(op).names()


def select(op: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """See Registry.select."""
    return registry(op).select(name, device, dtype, head_dim)


# Two caches of pure facts about this machine, keyed by everything they depend on. Package versions cannot change under
# a running process, so they are no part of the key; results are not kept between processes, where they could.
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
def _best(registry: Registry, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    op, passed_over = registry.op, []
    for backend in registry.ranked():
        if backend.max_error is not None:
            passed_over.append(f"{backend.name}: lossy, runs only when named")
        elif why := backend.why_not(device, dtype, head_dim) or self_test(op, backend, device, dtype, head_dim):
            passed_over.append(f"{backend.name}: {why}")
        else:
            skipped = f" (passed over: {'; '.join(passed_over)})" if passed_over else ""
            logger.info("%s: %s on %s%s", op.name, backend.name, _place(device, dtype, head_dim), skipped)
            return backend
    reasons = "; ".join(passed_over) or "none is registered"
    raise UnsupportedBackendError(f"no {op.name} backend can run on {_place(device, dtype, head_dim)}: {reasons}")


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


def _importable(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _sm_reasons(device: torch.device, low: tuple[int, int] | None, high: tuple[int, int] | None) -> list[str]:
    wanted = " to ".join(dict.fromkeys(f"sm_{major}{minor}" for major, minor in filter(None, (low, high))))
    wanted += " or newer" if high is None else "" if low else " or older"
    if device.type != "cuda" or torch.version.hip:
        return [f"needs an NVIDIA GPU ({wanted}), got {'ROCm' if torch.version.hip else device.type}"]
    sm = torch.cuda.get_device_capability(device)
    if (low and sm < low) or (high and sm > high):
        return [f"needs {wanted}, this GPU is sm_{sm[0]}{sm[1]}"]
    return []


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
    return f"{device}{gpu}, {_short(dtype)}, head_dim {head_dim}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(items: Any) -> str:
    *first, last = items
    return f"{', '.join(first)} or {last}" if first else last
