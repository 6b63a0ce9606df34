"""The border of the sampler: noise, emptiness, hand-over, masks, cancel. A tiny random Wan does the denoising."""

import logging

import pytest
import torch
from torch import Tensor, nn

from lightx2v.config import Sampling
from lightx2v.diffuse import Hooks, Model, Start, diffuse, noise_like
from lightx2v.guidance import Conditioning
from lightx2v.models import specs
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import select

EMPTY = torch.zeros(1, 16, 2, 4, 6)
COND = Conditioning(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3)))
UNCOND = Conditioning(torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4)))
EULER = Sampling(seed=7, steps=6, cfg_scale=3.0, scheduler="euler")


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    config = WanConfig(128, 64, 2, 16, 16, 32, 64, (1, 2, 2))
    torch.manual_seed(0)
    kernels = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)
    return WanTransformer(config, kernels).eval().requires_grad_(False)


CPU = torch.device("cpu")
T2V = next(spec for spec in specs() if spec.name == "wan2.1_t2v")


def run(transformer: nn.Module, latents: Tensor = EMPTY, sampling: Sampling = EULER, **options) -> Tensor:
    options.setdefault("uncond", UNCOND)
    start = Start(latents, options.pop("mask", None), options.pop("batch_index", None))
    uncond = options.pop("uncond")
    return diffuse(Model(T2V, CPU, lambda: transformer), start, sampling, COND, uncond, **options)


def part(**changes) -> Sampling:
    return Sampling(**{**EULER.__dict__, **changes})


def test_same_seed_same_latents_and_nothing_global_is_seeded(transformer: nn.Module) -> None:
    before = torch.random.get_rng_state()
    first, again, other = run(transformer), run(transformer), run(transformer, sampling=part(seed=8))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.shape == EMPTY.shape
    assert first.dtype == torch.float32


def test_halves_make_the_whole(transformer: nn.Module) -> None:
    whole = run(transformer)
    half = run(transformer, sampling=part(end_step=3))
    rest = run(transformer, half, part(start_step=3, add_noise=False))
    assert (half - whole).abs().max() > 0.1
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-4)


def test_empty_latents_of_another_space_stand_for_the_same_pixels(transformer: nn.Module) -> None:
    for empty in (torch.zeros(1, 4, 2, 4, 6), torch.zeros(1, 48, 2, 2, 3)):
        assert torch.equal(run(transformer, empty), run(transformer))
    assert run(transformer, torch.zeros(1, 4, 4, 6)).shape == (1, 16, 1, 4, 6)


def test_latents_of_another_vae_are_refused(transformer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"have 48 channels, the model's have 16: encode with the VAE"):
        run(transformer, torch.ones(1, 48, 2, 4, 6))


def test_batch_entries_can_be_cut_out(transformer: nn.Module) -> None:
    batch = noise_like(torch.zeros(3, 16, 2, 4, 6), 7)
    torch.testing.assert_close(noise_like(EMPTY, 7, [0]), batch[:1])
    cut = noise_like(torch.zeros(2, 16, 2, 4, 6), 7, [2, 0])
    assert torch.equal(cut, torch.cat([batch[2:], batch[:1]]))


def test_mask_keeps_what_it_covers(transformer: nn.Module) -> None:
    clean = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 2, 4, 6)
    mask[:, :, 0] = 0
    out = run(transformer, clean, mask=mask)
    torch.testing.assert_close(out[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    assert (out[:, :, 1] - clean[:, :, 1]).abs().max() > 0.1


def test_cfg_one_runs_the_conditional_pass_only(transformer: nn.Module) -> None:
    calls = []
    handle = transformer.register_forward_hook(lambda *a: calls.append(1))
    try:
        run(transformer, sampling=part(cfg_scale=1.0), uncond=None)
        assert len(calls) == 6
        run(transformer)
        assert len(calls) == 6 + 12
    finally:
        handle.remove()


def test_guidance_needs_a_negative(transformer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"cfg_scale=3\.0 needs a negative prompt"):
        run(transformer, uncond=None)


class Cancelled(Exception):
    pass


def test_cancel_within_a_step(transformer: nn.Module) -> None:
    blocks = []

    def cancel() -> None:
        blocks.append(1)
        if len(blocks) == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(transformer, hooks=Hooks(on_block=cancel))
    assert len(blocks) == 7  # 2 blocks, 2 passes a step: the fourth block of the second step never ran
    assert torch.equal(run(transformer), run(transformer))


def test_steps_are_counted_over_the_whole_schedule(transformer: nn.Module) -> None:
    seen = []
    run(
        transformer, sampling=part(start_step=2, end_step=4), hooks=Hooks(lambda s, x0: seen.append((s.index, s.total)))
    )
    assert seen == [(2, 6), (3, 6)]


def test_four_distilled_steps_are_four_calls(transformer: nn.Module) -> None:
    seen = []
    sampling = Sampling(scheduler="distilled", cfg_scale=1.0)
    run(transformer, sampling=sampling, uncond=None, hooks=Hooks(lambda s, x0: seen.append(s.timestep)))
    assert seen == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3)


def test_few_steps_with_guidance_are_warned_of(transformer: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(transformer, sampling=part(steps=4))
        assert "4 steps with cfg 3" in caplog.text
        caplog.clear()
        run(transformer, sampling=part(steps=9))
        assert not caplog.text


class Counted:
    """A network that says which of several it is."""

    def __init__(self, network: nn.Module, name: str, calls: list[str]) -> None:
        self.network, self.name, self.calls = network, name, calls

    def __call__(self) -> nn.Module:
        self.calls.append(self.name)
        return self.network


def pair(transformer: nn.Module, sampling: Sampling, *, low: nn.Module | None = None) -> tuple[list[str], Tensor]:
    calls: list[str] = []
    model = Model(T2V, CPU, Counted(transformer, "high", calls), Counted(low or transformer, "low", calls))
    return calls, diffuse(model, Start(EMPTY), sampling, COND, UNCOND)


def test_experts_change_at_the_boundary_and_each_has_its_guidance(transformer: nn.Module) -> None:
    """Shift 5, 6 steps: sigma 1, 0.962, 0.909, 0.833, ...: three steps at 0.875 or above."""
    calls, whole = pair(transformer, part(shift=5.0))
    assert calls == ["high"] * 6 + ["low"] * 6
    assert torch.equal(whole, run(transformer, sampling=part(shift=5.0)))
    calls, _ = pair(transformer, part(shift=5.0, boundary=0.95, cfg_low=1.0))
    assert calls == ["high"] * 4 + ["low"] * 4
    calls, _ = pair(transformer, part(cfg_scale=1.0, boundary_step=2))
    assert calls == ["high"] * 2 + ["low"] * 4


def test_experts_are_two_samplers_in_one(transformer: nn.Module) -> None:
    torch.manual_seed(5)
    other = WanTransformer(transformer.config, transformer.blocks[0]._kernels).eval().requires_grad_(False)
    _, together = pair(transformer, part(boundary_step=2, cfg_low=2.0), low=other)
    half = run(transformer, sampling=part(end_step=2))
    rest = run(other, half, part(start_step=2, add_noise=False, cfg_scale=2.0))
    torch.testing.assert_close(together, rest, rtol=1e-4, atol=1e-4)
    # A part of the schedule finds the same expert, whatever its first step.
    calls, _ = pair(transformer, part(boundary_step=2, start_step=1, end_step=3), low=other)
    assert calls == ["high"] * 2 + ["low"] * 2


def test_a_boundary_outside_the_noise_levels_is_refused(transformer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"boundary=875 is a noise level from 0 to 1"):
        pair(transformer, part(boundary=875))


def test_kept_frames_of_ti2v_are_clean_and_at_timestep_zero() -> None:
    spec = next(spec for spec in specs() if spec.name == "wan2.2_ti2v")
    config = WanConfig(128, 64, 2, 48, 48, 32, 64, (1, 2, 2))
    kernels = select(device=CPU, dtype=torch.float32, head_dim=128)
    network = WanTransformer(config, kernels).eval().requires_grad_(False)
    clean = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    seen: list[tuple[Tensor, Tensor]] = []
    handle = network.register_forward_hook(lambda module, given, out: seen.append((given[0], given[1])))
    try:
        out = diffuse(Model(spec, CPU, lambda: network), Start(clean, mask), part(steps=3), COND, UNCOND)
    finally:
        handle.remove()
    torch.testing.assert_close(out[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    assert (out[:, :, 1:] - clean[:, :, 1:]).abs().max() > 0.1
    for latents, timestep in seen:
        assert timestep.shape == (1, 3) and timestep[0, 0] == 0 and timestep[0, 1] == timestep[0, 2] > 0
        torch.testing.assert_close(latents[:, :, 0], spec.latents.normalize(clean)[:, :, 0])
