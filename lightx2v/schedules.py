"""Noise levels: which sigmas a request visits and which timestep the transformer is told at each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TRAIN_STEPS = 1000  # discrete levels that flow models of this kind are trained on


@dataclass(frozen=True)
class Schedule:
    """Plain floats on the host, so that reading a level never waits for the GPU."""

    sigmas: tuple[float, ...]  # steps + 1 values, descending
    timesteps: tuple[float, ...]  # steps values: what the transformer reads, about 1000 * sigma
    first: int = 0  # where in the full schedule this one begins
    total: int = 0  # steps of the full schedule; 0: this is the full one

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise ValueError(f"{len(self.sigmas)} sigmas need one timestep fewer, got {len(self.timesteps)}")
        if not self.total:
            object.__setattr__(self, "total", len(self.timesteps))

    def between(self, start: int, end: int) -> "Schedule":
        """Steps start..end-1 of this schedule; the last sigma stays where the full schedule had it."""
        total = len(self.timesteps)
        if start >= total:
            raise ValueError(f"start_step {start} is past the last of {total} steps, which is {total - 1}")
        if not 0 <= start < end:
            raise ValueError(f"steps {start} to {end} of {total} are empty; start_step must be below end_step")
        return Schedule(self.sigmas[start : end + 1], self.timesteps[start:end], self.first + start, self.total)


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Spend more steps at high noise for shift > 1 (SD3, arXiv:2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _require(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if steps > TRAIN_STEPS:
        raise ValueError(f"steps must be at most {TRAIN_STEPS}, got {steps}")
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}; Wan uses 3 to 12, 5 is usual")


def simple(steps: int, shift: float) -> Schedule:
    """Every (1000 / steps)-th entry of the trained levels, from 1 down to 0: ComfyUI's "simple" scheduler."""
    _require(steps, shift)
    table = shifted(torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float32) / TRAIN_STEPS, shift).tolist()
    sigmas = [table[-1 - int(i * TRAIN_STEPS / steps)] for i in range(steps)]
    return Schedule((*sigmas, 0.0), tuple(TRAIN_STEPS * sigma for sigma in sigmas))


def wan(steps: int, shift: float) -> Schedule:
    """Wan's own levels: a line from 0.999 to 0 without its end, shifted; whole timesteps, rounded down.

    Source: Wan2.1 wan/utils/fm_solvers_unipc.py, set_timesteps.
    """
    _require(steps, shift)
    first = torch.tensor(1 - 1 / TRAIN_STEPS, dtype=torch.float32).item()  # Wan keeps it in float32
    line = torch.linspace(first, 0, steps + 1, dtype=torch.float64)[:-1]
    levels = shifted(line, shift)
    timesteps = tuple(float(int(sigma * TRAIN_STEPS)) for sigma in levels.tolist())
    return Schedule((*levels.float().tolist(), 0.0), timesteps)


def listed(denoising_step_list: Sequence[int], shift: float) -> Schedule:
    """The levels a step-distilled model was trained on, e.g. [1000, 750, 500, 250] at shift 5: 1, .9375, .8333, .625.

    An entry is an unshifted level in thousandths. Source: LightX2V wan/step_distill scheduler (behaviour).
    """
    entries = list(denoising_step_list)
    _require(max(len(entries), 1), shift)
    if not entries or any(not 0 < e <= TRAIN_STEPS for e in entries) or sorted(set(entries), reverse=True) != entries:
        raise ValueError(f"denoising_step_list must fall from at most 1000 to above 0, got {entries}")
    sigmas = shifted(torch.tensor(entries, dtype=torch.float32) / TRAIN_STEPS, shift).tolist()
    return Schedule((*sigmas, 0.0), tuple(TRAIN_STEPS * sigma for sigma in sigmas))


def parse_step_list(text: str) -> tuple[int, ...]:
    """ "1000, 750, 500, 250" -> (1000, 750, 500, 250)."""
    try:
        return tuple(int(part) for part in text.replace("[", "").replace("]", "").split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"denoising_step_list {text!r}: write whole numbers like 1000, 750, 500, 250") from error
