"""Flow ODE solvers that consume x0 estimates. A solver is a call; multistep ones remember, so make one per request."""

import math
from collections.abc import Callable

from torch import Tensor

from lightx2v.sampling import Solver, Step


def euler(latents: Tensor, x0: Tensor, step: Step) -> Tensor:
    """One first-order step along the velocity (latents - x0) / sigma."""
    return latents + (step.sigma_next - step.sigma) * ((latents - x0) / step.sigma)


def _log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma) with alpha = 1 - sigma."""
    if sigma <= 0:
        return math.inf
    return math.log(1 - sigma) - math.log(sigma) if sigma < 1 else -math.inf


class UniPC:
    """UniPC of order 2, B(h) = exp(h) - 1 ("bh2"), predicting x0; order 1 at the first and the last step.

    Source: arXiv:2302.04867, algorithms 1 and 2 with eq. 5 to 9; the settings are Wan's
    (Wan2.1 wan/utils/fm_solvers_unipc.py: solver_order 2, bh2, predict_x0, lower_order_final).
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None  # latents before the last step, their sigma
        self._estimates: list[tuple[Tensor, float]] = []  # up to two (x0, lambda), newest last
        self._order = 0  # of the last prediction: the corrector repeats it

    def __call__(self, latents: Tensor, x0: Tensor, step: Step) -> Tensor:
        current = _log_snr(step.sigma)
        if self._previous is not None:
            latents = self._correct(x0, step.sigma, current)
        self._estimates = [*self._estimates[-1:], (x0, current)]
        last = step.index == step.total - 1
        usable = [lam for _, lam in self._estimates if math.isfinite(lam)]
        self._order = 1 if last else max(1, min(2, len(usable)))
        self._previous = (latents, step.sigma)
        return self._predict(latents, step)

    def _predict(self, latents: Tensor, step: Step) -> Tensor:
        """From sigma to sigma_next with the estimates known so far."""
        if step.sigma_next <= 0:
            return self._estimates[-1][0]  # the limit of the update for lambda -> infinity, at order 1
        (newest, current), alpha = self._estimates[-1], 1 - step.sigma_next
        h = _log_snr(step.sigma_next) - current
        phi = math.expm1(-h)
        out = (step.sigma_next / step.sigma) * latents - (alpha * phi) * newest
        if self._order == 2:
            older, lam = self._estimates[-2]
            ratio = (lam - current) / h
            out = out - (alpha * phi * 0.5 / ratio) * (older - newest)
        return out

    def _correct(self, x0: Tensor, sigma: float, current: float) -> Tensor:
        """Redo the last step now that the estimate at its end is known."""
        assert self._previous is not None
        latents, sigma_before = self._previous
        (newest, lam), alpha = self._estimates[-1], 1 - sigma
        h = current - lam
        phi = math.expm1(-h)
        out = (sigma / sigma_before) * latents - (alpha * phi) * newest
        if self._order == 1:
            return out - (alpha * phi * 0.5) * (x0 - newest)
        older, lam_older = self._estimates[-2]
        ratio = (lam_older - lam) / h
        # Solve [[1, 1], [ratio, 1]] rho = b, where b_k = k! * phi_{k+1}(-h) * (-h) / B(h)
        first = (phi / -h - 1) / phi
        second = 2 * ((phi / -h - 1) / -h - 0.5) / phi
        rho_older = (first - second) / (1 - ratio)
        rho_new = first - rho_older
        return out - (alpha * phi * rho_older / ratio) * (older - newest) - (alpha * phi * rho_new) * (x0 - newest)


def _euler() -> Solver:
    return euler


SOLVERS: dict[str, Callable[[], Solver]] = {"unipc": UniPC, "euler": _euler}
