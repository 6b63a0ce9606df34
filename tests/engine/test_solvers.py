"""Solvers on flows whose end is known exactly."""

import pytest
import torch
from torch import Tensor

from lightx2v.sampling import Step, sample
from lightx2v.schedules import Schedule
from lightx2v.solvers import SOLVERS, UniPC, euler

CLEAN = torch.randn(1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = torch.randn(1, 2, 1, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def line(steps: int, first: float = 1.0, last: float = 0.0) -> Schedule:
    sigmas = [first + (last - first) * i / steps for i in range(steps + 1)]
    return Schedule(tuple(sigmas), tuple(1000 * s for s in sigmas[:-1]))


def noisy(sigma: float) -> Tensor:
    return sigma * NOISE + (1 - sigma) * CLEAN


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("first", [1.0, 0.9])
def test_a_straight_flow_is_exact(name: str, first: float) -> None:
    out = sample(lambda x, step: CLEAN, noisy(first), line(5, first), SOLVERS[name]())
    torch.testing.assert_close(out, CLEAN, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_stopping_early_leaves_the_right_noise(name: str) -> None:
    out = sample(lambda x, step: CLEAN, noisy(0.9), line(4, 0.9, 0.4), SOLVERS[name]())
    torch.testing.assert_close(out, noisy(0.4), rtol=1e-12, atol=1e-12)


def gaussian_x0(x: Tensor, step: Step) -> Tensor:
    """E[x0 | x_sigma] for x0 ~ N(0, s^2): the exact flow scales x by std(sigma), std^2 = (1-sigma)^2 s^2 + sigma^2."""
    s2, a = 0.25, 1 - step.sigma
    return x * a * s2 / (a * a * s2 + step.sigma**2)


def gaussian_error(name: str, steps: int) -> float:
    first, last, s2 = 0.95, 0.05, 0.25
    out = sample(gaussian_x0, NOISE, line(steps, first, last), SOLVERS[name]())
    scale = ((1 - last) ** 2 * s2 + last**2) ** 0.5 / ((1 - first) ** 2 * s2 + first**2) ** 0.5
    return float((out - scale * NOISE).norm() / (scale * NOISE).norm())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("unipc", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    coarse, fine = gaussian_error(name, 160), gaussian_error(name, 320)
    assert coarse < 0.01
    assert coarse / fine > 0.85 * 2**order


def test_unipc_is_one_instance_a_request() -> None:
    assert SOLVERS["unipc"]() is not SOLVERS["unipc"]()
    assert isinstance(SOLVERS["unipc"](), UniPC)


def test_a_step_that_is_not_finite_is_named() -> None:
    def broken(x: Tensor, step: Step) -> Tensor:
        return x * (float("nan") if step.index == 2 else 1)

    with pytest.raises(FloatingPointError, match="step 3 of 5"):
        sample(broken, noisy(1.0), line(5), euler)
