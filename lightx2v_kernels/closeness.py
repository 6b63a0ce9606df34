"""How close is close enough: the one rule that self-tests, tests and benchmarks share.

An output may be at most twice as wrong as plain PyTorch is at the same dtype, plus a rounding floor. Both are measured
against the same maths in a wider dtype: fp32, or fp64 where the output itself is fp32 (two right ways to sum 1000
softmaxed values in fp32 are 1e-6 apart). No tolerance per shape or per kernel. Source of the rule: flash-attention
(Dao-AILab), tests/test_flash_attn.py.

Two distances are held to it, because each is blind where the other sees: the root-mean-square one (a few per cent of
everything is wrong) and the largest single one (one element in a million is wrong). A maximum is a noisy statistic, so
the second gets twice the slack: the backward of PyTorch's fp32 attention peaks at 2.8 times the error of the plain one.
"""

import torch
from torch import Tensor


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| over all elements, in float64. NaN if either holds one; inf if b is all zero and a is not."""
    difference, size = (a.double() - b.double()).norm().item(), b.double().norm().item()
    return _ratio(difference, size)


def peak_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, in float64. NaN if either holds one; inf if b is all zero and a is not."""
    difference, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    return _ratio(difference, size)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors of any one shape, in float64; 1 where both are the same but for a factor."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def rounding_floor(dtype: torch.dtype) -> float:
    """Relative error granted to any two correct implementations with results in `dtype`.

    Every op accumulates in fp32, in an order of its own: 4 ulp of fp32. A narrower result is then rounded, and a value
    near the middle of two neighbours may go either way: an eighth of an ulp of `dtype` over a whole tensor.
    """
    accumulation = 4 * torch.finfo(torch.float32).eps
    return accumulation if dtype == torch.float32 else accumulation + torch.finfo(dtype).eps / 8


def why_too_far(out: Tensor, reference: Tensor, baseline: Tensor) -> str | None:
    """The reason, in words with both figures, why `out` may not stand for `reference`; None if it may.

    out: what is judged. reference: the same maths in fp32 or fp64. baseline: plain PyTorch on the same inputs, in the
        dtype of `out`.
    """
    if reference.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the reference must be float32 or float64, got {reference.dtype}: run it on inputs cast to one of them"
        )
    if baseline.dtype != out.dtype:
        return f"dtype {out.dtype}, expected {baseline.dtype}"
    if out.shape != reference.shape or baseline.shape != reference.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(reference.shape)} (baseline {tuple(baseline.shape)})"
    if not torch.isfinite(out).all():
        return f"{int((~torch.isfinite(out)).sum())} of {out.numel()} values are not finite"
    for kind, error, slack in (("relative error", relative_error, 1), ("peak error", peak_error, 2)):
        plain = error(baseline, reference)
        limit = slack * (2 * plain + rounding_floor(out.dtype))
        # Written as "not <=" so that a NaN in the reference or the baseline fails too.
        if not (found := error(out, reference)) <= limit:
            return f"{kind} {found:.2e} is above {limit:.2e} (plain PyTorch at {out.dtype}: {plain:.2e})"
    return None


def _ratio(difference: float, size: float) -> float:
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size
