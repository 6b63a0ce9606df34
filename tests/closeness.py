"""The one assert on tensors. Its rule, and why there is no tolerance per test, is in lightx2v_kernels/closeness.py."""

from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.closeness import relative_error, why_too_far
from lightx2v_kernels.registry import Backend

__all__ = ["assert_backend", "assert_close", "assert_exact_enough", "relative_error"]


def assert_close(name: str, out: Tensor, reference_fp32: Tensor, baseline: Tensor) -> None:
    """`out` is at most twice as wrong as `baseline`, plus the rounding floor of its dtype.

    baseline: plain PyTorch on the same inputs, at the dtype of `out`.
    reference_fp32: the same maths in fp32, or in fp64 where `out` is itself fp32.
    """
    reason = why_too_far(out, reference_fp32, baseline)
    assert reason is None, f"{name}: {reason}"


def assert_exact_enough(a: Tensor, b: Tensor, tol: float = 1e-6) -> None:
    """Two fp32 ways to the same value agree to `tol` (relative error), with one shape and no value that is not finite.

    1e-6 is not generous: a swapped RoPE axis moves a small Wan by 5e-6.
    """
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), "values that are not finite"
    error = relative_error(a, b)
    assert error <= tol, f"relative error {error:.2e} is above {tol:.2e}"


def assert_backend(backend: Backend, args: tuple[Any, ...], truth: Tensor, baseline: Tensor) -> None:
    """The backend computes `truth` (fp64) from `args`: to the rule above, or to the error that a lossy one declares.

    baseline: never what the package itself computes, or a fault there would widen the tolerance that should catch it.
    """
    with torch.no_grad():
        out = backend.load()(*args)
    if backend.max_error is None:
        assert_close(f"{backend.op}/{backend.name}", out, truth, baseline)
    else:
        assert out.dtype == baseline.dtype
        assert_exact_enough(out, truth, backend.max_error)
