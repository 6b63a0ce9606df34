"""MagCache (arXiv:2506.09045): skip while the residual's magnitude, as measured once, would hardly have changed."""

from collections.abc import Sequence

from torch import Tensor


def nearest(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Ratios that were measured on another number of steps: for each step the nearest measured one, ends on ends.

    Source: MagCache4Wan2.1, nearest_interp. With fewer steps than were measured a step spans several ratios of which
    one is taken, so the change is underestimated: measure at the number of steps that is used.
    """
    if not ratios:
        raise ValueError("MagCache needs at least one ratio")
    if steps == 1:
        return (ratios[-1],)
    scale = (len(ratios) - 1) / (steps - 1)
    return tuple(ratios[round(step * scale)] for step in range(steps))


def skipped_steps(
    ratios: Sequence[float],
    threshold: float,
    *,
    max_skips: int = 6,
    retention_ratio: float = 0.2,
    first: int = 0,
) -> frozenset[int]:
    """Which of a network's steps reuse the residual of the last computed one.

    ratios: one a step, magnitude of the residual over that of the step before. first: the first step that runs; it is
    computed. max_skips: skipped in a row at most (K). retention_ratio: share of the steps computed at the start.
    With P the product of the ratios since the last computed step, the error is the sum of |1 - P|; a step is skipped
    while that is below the threshold. Source: MagCache4Wan2.1, magcache_generate.py.
    """
    skipped, kept = set(), int(len(ratios) * retention_ratio)
    product, error, count = 1.0, 0.0, 0
    for step in range(max(first + 1, kept), len(ratios)):
        product *= ratios[step]
        error += abs(1 - product)
        count += 1
        if error < threshold and count <= max_skips:
            skipped.add(step)
        else:
            product, error, count = 1.0, 0.0, 0
    return frozenset(skipped)


def magnitude_ratio(residual: Tensor, before: Tensor) -> float:
    """Mean over the tokens of |residual| / |residual of the step before|, both (B, L, D)."""
    norms, earlier = residual.float().norm(dim=-1), before.float().norm(dim=-1)
    return (norms / earlier.clamp(min=1e-12)).mean().item()
