"""Our UniPC and Wan's sigmas against diffusers' UniPCMultistepScheduler, told to start where Wan starts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from closeness import relative_error
from lightx2v.sampling import Step, sample
from lightx2v.schedules import wan
from lightx2v.solvers import UniPC


def curved_velocity(latents: Tensor, timestep: float) -> Tensor:
    """A smooth field that depends on both arguments, so that no solver is exact on it."""
    return torch.sin(1.7 * latents + timestep / 300) - 0.4 * latents


@pytest.fixture
def scheduler():
    from diffusers import UniPCMultistepScheduler

    def make(steps: int, shift: float):
        theirs = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
        )
        # diffusers starts its line at 1, Wan at sigma_max = 0.999 (in float32)
        theirs.set_timesteps(sigmas=np.linspace(np.float32(0.999), 0, steps + 1)[:-1])
        return theirs

    return make


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (4, 5.0), (20, 5.0), (50, 3.0), (50, 5.0)])
def test_agrees_with_diffusers(scheduler, steps: int, shift: float) -> None:
    theirs = scheduler(steps, shift)
    schedule = wan(steps, shift)
    torch.testing.assert_close(torch.tensor(schedule.sigmas), theirs.sigmas, rtol=2e-6, atol=1e-7)
    assert list(schedule.timesteps) == [float(t) for t in theirs.timesteps]

    latents = torch.randn(1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = latents.clone()
    theirs.sigmas = theirs.sigmas.double()
    for t in theirs.timesteps:
        expected = theirs.step(curved_velocity(expected, float(t)), t, expected, return_dict=False)[0]

    def denoise(x: Tensor, step: Step) -> Tensor:
        return x - step.sigma * curved_velocity(x, step.timestep)

    actual = sample(denoise, latents, schedule, UniPC())
    assert relative_error(actual, expected) < 2e-6
