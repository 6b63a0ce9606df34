"""Figures: what was measured of one checkpoint, once, so that a cache knows which steps it may skip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Polynomial:
    """TeaCache's map from the change of the time embedding to the change of the output.

    coefficients: highest power first. measured: the least and the greatest change that it was fitted to, if known.
    """

    coefficients: tuple[float, ...]
    measured: tuple[float, float] | None = None

    def __call__(self, change: float) -> float:
        """Beyond what was measured in proportion, since no change changes nothing; a polynomial would go anywhere."""
        if self.measured is not None and change > 0:
            nearest = min(max(change, self.measured[0]), self.measured[1])
            if nearest != change:
                return self(nearest) * change / nearest
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


@dataclass(frozen=True)
class Figures:
    """Measured of one network.

    name: where they come from, for messages.
    tea: TeaCache's polynomial over the change of the time embedding, highest power first; empty where none is known.
    tea_projected: the same over the projected embedding, for use_ret_steps.
    tea_range, tea_projected_range: see `Polynomial.measured`.
    mag: MagCache's ratios of the conditional branch, one a step: mean magnitude of the blocks' residual over that of
        the step before; the first is 1. Empty where none are known.
    mag_uncond: of the unconditional branch; empty: the same as `mag`.
    usual: method -> threshold for this checkpoint where that is not the method's own; without use_ret_steps.
    steps, shift: of the schedule that they were measured on; 0 where that is not known.
    """

    name: str
    tea: tuple[float, ...] = ()
    tea_projected: tuple[float, ...] = ()
    mag: tuple[float, ...] = field(default=(), repr=False)
    mag_uncond: tuple[float, ...] = field(default=(), repr=False)
    steps: int = 0
    shift: float = 0.0
    tea_range: tuple[float, float] | None = None
    tea_projected_range: tuple[float, float] | None = None
    usual: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mag_uncond and len(self.mag_uncond) != len(self.mag):
            raise ValueError(
                f"{self.name}: {len(self.mag)} MagCache ratios of the conditional branch and {len(self.mag_uncond)} of "
                "the unconditional one; there is one a step in both"
            )

    def polynomial(self, projected: bool) -> Polynomial:
        """TeaCache's; raises ValueError where none is known."""
        found = self.tea_projected if projected else self.tea
        if not found:
            other = "without" if projected else "with"
            hint = f", or {other} use_ret_steps" if self.tea or self.tea_projected else ""
            raise ValueError(
                f"{self.name}: no TeaCache coefficients {'with' if projected else 'without'} use_ret_steps; "
                f"{CALIBRATE}{hint}"
            )
        return Polynomial(found, self.tea_projected_range if projected else self.tea_range)

    def ratios(self, uncond: bool) -> tuple[float, ...]:
        """MagCache's; raises ValueError where none are known."""
        if not self.mag:
            raise ValueError(f"{self.name}: no MagCache ratios; {CALIBRATE}")
        return self.mag_uncond if uncond and self.mag_uncond else self.mag


CALIBRATE = (
    "measure them with `python -m lightx2v calibrate --model_path FOLDER`, which writes a .cache.json next to the "
    "checkpoint, or use another cache"
)


def given(coefficients: Sequence[Any], ratios: Sequence[Any]) -> Figures | None:
    """Figures as LightX2V's configs hold them, or None where both are empty.

    coefficients: [with use_ret_steps, without], or one polynomial for either; highest power first.
    ratios: [conditional, unconditional], or one list for both; one number a step.
    """
    if not coefficients and not ratios:
        return None
    with_ret, without = _pair("coefficients", coefficients)
    cond, uncond = _pair("magcache_ratios", ratios)
    return Figures("given", tea=without, tea_projected=with_ret, mag=cond, mag_uncond=uncond)


def _pair(name: str, values: Sequence[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    lists = list(values) if values and isinstance(values[0], Sequence) else [values, values]
    if len(lists) != 2:
        raise ValueError(f"{name}={values!r}: give one list of numbers, or two of them")
    first, second = (tuple(float(number) for number in numbers) for numbers in lists)
    return first, second
