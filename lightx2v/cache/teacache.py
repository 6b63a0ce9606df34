"""TeaCache (arXiv:2411.19108): skip while the accumulated change of the time embedding stays small.

For Wan the change depends on the timestep alone, never on the latents, so all skips are known before the first step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RET_STEPS = 5  # computed at the start with use_ret_steps (TeaCache4Wan2.1, teacache_generate.py)


def changes(signal: Tensor) -> list[float]:
    """Relative L1 change of a signal (N, K) from each step to the next: N - 1 values, after one copy to the host."""
    signal = signal.cpu().double()
    before, after = signal[:-1], signal[1:]
    return ((after - before).abs().mean(1) / before.abs().mean(1)).tolist()


def skipped_steps(
    changed: Sequence[float],
    polynomial: Callable[[float], float],
    threshold: float,
    *,
    first: int = 0,
    use_ret_steps: bool = False,
) -> frozenset[int]:
    """Which of a network's N steps reuse the residual of the last computed one.

    changed: N - 1 relative changes, step to step. first: the first step that runs; it is computed.
    With use_ret_steps the first 5 steps are computed, otherwise the first and the last. In between a step is skipped
    while the sum of polynomial(change) since the last computed step is below the threshold.
    Source: TeaCache4Wan2.1, teacache_generate.py.
    """
    steps, total, skipped = len(changed) + 1, 0.0, set()
    begin, end = (RET_STEPS, steps) if use_ret_steps else (1, steps - 1)
    if threshold <= 0:
        # The fit may be negative, so that the sum could be below 0 too: 0 is off by definition.
        return frozenset()
    for step in range(first, steps):
        if step == first or not begin <= step < end:
            total = 0.0
            continue
        total += polynomial(changed[step - 1])
        if total < threshold:
            skipped.add(step)
        else:
            total = 0.0
    return frozenset(skipped)


def fit(points: Sequence[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """Least squares: coefficients, highest power first, of the polynomial through (change of signal, change of output).

    Computed in float64 on abscissas scaled to [0, 1]. Raises ValueError for fewer than degree + 2 different abscissas.
    """
    if len({x for x, _ in points}) < degree + 2:
        raise ValueError(
            f"{len(points)} changes between steps are too few for a polynomial of degree {degree}; calibrate with more "
            "steps: 20 or more, with two experts 50"
        )
    table = torch.tensor(points, dtype=torch.float64)
    reach = table[:, 0].max()
    powers = torch.stack([(table[:, 0] / reach) ** power for power in range(degree, -1, -1)], 1)
    solved = torch.linalg.lstsq(powers, table[:, 1:]).solution[:, 0]
    return tuple((value / reach**power).item() for value, power in zip(solved, range(degree, -1, -1), strict=True))
