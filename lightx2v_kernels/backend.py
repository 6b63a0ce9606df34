"""One implementation of one op: what it needs, why it cannot run somewhere, and how it proves itself there."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.closeness import relative_error, why_too_far
from lightx2v_kernels.machine import importable, listed, short, sm_reasons, version_reason
from lightx2v_kernels.quantized import tensors, widths


@dataclass(frozen=True)
class Op:
    """The contract of one op.

    reference: plain PyTorch with fp32 inside: the definition of the op, and its CPU path.
    examples: (device, dtype, head_dim) -> argument tuples, small, for the self-test; strided inputs among them.
    plain: the op as one would write it in PyTorch at the inputs' own dtype; its error is the yardstick of the
        self-test; None: the reference itself.
    truth: what the result stands for where that is not what the reference computes in fp64: tokens before they were
        put into 8 bits; None: the reference itself.
    """

    name: str
    reference: Callable[..., Any]
    examples: Callable[[torch.device, torch.dtype, int], tuple[tuple[Any, ...], ...]]
    plain: Callable[..., Any] | None = None
    truth: Callable[..., Any] | None = None


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
    partial: imports and returns, where there is one, attention with the logarithm of each softmax's denominator, by
        which attention to parts of the keys is merged: (B, L, H, D), and (B, H, L) float32.
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
    partial: Callable[[], Callable[..., tuple[Tensor, Tensor]]] | None = None
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


# A cache of pure facts about this machine, keyed by all that they depend on. Package versions cannot change under a
# running process, so they are no part of the key.
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
